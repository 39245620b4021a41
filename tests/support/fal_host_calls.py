"""Requests to each host given as an argument, by each Python HTTP client that honours proxy variables.

Prints the response or the error of each request as JSON.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import aiohttp
import httpx
import requests
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

Response = tuple[int, str]


def _httpx(url: str) -> Response:
    response = httpx.get(url)
    return response.status_code, response.text


def _requests(url: str) -> Response:
    response = requests.get(url, timeout=30)
    return response.status_code, response.text


def _aiohttp(url: str) -> Response:
    async def get_url() -> Response:
        async with aiohttp.ClientSession(trust_env=True) as session, session.get(url) as response:
            return response.status, await response.text()

    return asyncio.run(get_url())


def _aiohttp_websocket(url: str) -> Response:
    async def open_websocket() -> Response:
        try:
            async with (
                aiohttp.ClientSession(trust_env=True) as session,
                session.ws_connect(url.replace("http", "ws", 1)),
            ):
                return 101, ""
        except aiohttp.WSServerHandshakeError as refusal:
            return refusal.status, ""

    return asyncio.run(open_websocket())


def _websockets(url: str) -> Response:
    try:
        with connect(url.replace("http", "ws", 1)):
            return 101, ""
    except InvalidStatus as refusal:
        return refusal.response.status_code, ""


CLIENTS: dict[str, Callable[[str], Response]] = {
    "httpx": _httpx,
    "requests": _requests,
    "aiohttp": _aiohttp,
    "aiohttp, WebSocket": _aiohttp_websocket,
    "websockets": _websockets,
}


def _try_client(get: Callable[[str], Response], url: str) -> dict[str, Any]:
    try:
        status, text = get(url)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return {"status": status, "text": text}


if __name__ == "__main__":
    print(
        json.dumps(
            {
                f"{name}, {scheme}: {host}": _try_client(get, f"{scheme}://{host}/made/up")
                for host in sys.argv[1:]
                for name, get in CLIENTS.items()
                for scheme in ("https", "http")
            }
        )
    )
