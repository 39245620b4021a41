"""Every kind of client in Python that honours proxy variables, turned to each host that is named.

Prints, as JSON, what each was answered, or why it failed.
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

Answer = tuple[int, str]


def _httpx(url: str) -> Answer:
    answer = httpx.get(url)
    return answer.status_code, answer.text


def _requests(url: str) -> Answer:
    answer = requests.get(url, timeout=30)
    return answer.status_code, answer.text


def _aiohttp(url: str) -> Answer:
    async def get() -> Answer:
        async with aiohttp.ClientSession(trust_env=True) as session, session.get(url) as answer:
            return answer.status, await answer.text()

    return asyncio.run(get())


def _aiohttp_websocket(url: str) -> Answer:
    async def connect_to() -> Answer:
        try:
            async with (
                aiohttp.ClientSession(trust_env=True) as session,
                session.ws_connect(url.replace("http", "ws", 1)),
            ):
                return 101, ""
        except aiohttp.WSServerHandshakeError as refusal:
            return refusal.status, ""

    return asyncio.run(connect_to())


def _websockets(url: str) -> Answer:
    try:
        with connect(url.replace("http", "ws", 1)):
            return 101, ""
    except InvalidStatus as refusal:
        return refusal.response.status_code, ""


WAYS: dict[str, Callable[[str], Answer]] = {
    "httpx": _httpx,
    "requests": _requests,
    "aiohttp": _aiohttp,
    "aiohttp, WebSocket": _aiohttp_websocket,
    "websockets": _websockets,
}


def _tried(way: Callable[[str], Answer], url: str) -> dict[str, Any]:
    try:
        status, text = way(url)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return {"status": status, "text": text}


if __name__ == "__main__":
    print(
        json.dumps(
            {
                f"{name}, {scheme}: {host}": _tried(way, f"{scheme}://{host}/made/up")
                for host in sys.argv[1:]
                for name, way in WAYS.items()
                for scheme in ("https", "http")
            }
        )
    )
