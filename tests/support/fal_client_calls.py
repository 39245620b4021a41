"""What programs that use fal-client do: `python -m tests.support.fal_client_calls CALL ARGUMENT...` prints JSON."""

import asyncio
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import fal_client
from PIL import Image

#: Small, so that the demo weights paint it in a moment.
APPLE = {"prompt": "a red apple", "seed": 7, "image_size": "square", "num_inference_steps": 4}
FLUX = "fal-ai/flux/dev"


def version() -> Any:
    """Which fal-client this is."""
    return [importlib.metadata.version("fal-client"), str(Path(fal_client.__file__).parent)]


def everyday() -> Any:
    """Every way to the same picture."""
    updates: list[Any] = []
    enqueued: list[str] = []
    handle = fal_client.submit(FLUX, arguments=APPLE)
    events = [_shown(event) for event in handle.iter_events(with_logs=True)]
    return {
        "run": fal_client.run(FLUX, arguments=APPLE),
        "submit": handle.get(),
        "events": events,
        "subscribe": fal_client.subscribe(
            FLUX, arguments=APPLE, with_logs=True, on_enqueue=enqueued.append, on_queue_update=updates.append
        ),
        "updates": [_shown(update) for update in updates],
        "enqueued": enqueued,
        "stream": list(fal_client.stream(FLUX, arguments=APPLE)),
        "status": _shown(fal_client.status(FLUX, handle.request_id, with_logs=True)),
        "result": fal_client.result(FLUX, handle.request_id),
    }


async def everyday_async() -> Any:
    """The same without blocking."""
    updates: list[Any] = []
    enqueued: list[str] = []
    handle = await fal_client.submit_async(FLUX, arguments=APPLE)
    events = [_shown(event) async for event in handle.iter_events(with_logs=True)]
    return {
        "run": await fal_client.run_async(FLUX, arguments=APPLE),
        "submit": await handle.get(),
        "events": events,
        "subscribe": await fal_client.subscribe_async(
            FLUX, arguments=APPLE, with_logs=True, on_enqueue=enqueued.append, on_queue_update=updates.append
        ),
        "updates": [_shown(update) for update in updates],
        "enqueued": enqueued,
        "stream": [event async for event in fal_client.stream_async(FLUX, arguments=APPLE)],
        "status": _shown(await fal_client.status_async(FLUX, handle.request_id, with_logs=True)),
        "result": await fal_client.result_async(FLUX, handle.request_id),
    }


def watch(gate: str) -> Any:
    """The events of a request that takes one step after each look."""
    handle = fal_client.submit("test/gate", arguments={"prompt": gate, "num_inference_steps": 2})
    seen = []
    for event in handle.iter_events(with_logs=True):
        seen.append(_shown(event))
        if isinstance(event, fal_client.InProgress):
            _let_go(gate, 1)
    return seen


def cancel(gate: str) -> Any:
    """Cancel one request that runs and one that waits behind it; what each became."""
    running = fal_client.submit("test/gate", arguments={"prompt": gate})
    waiting = fal_client.submit("test/null", arguments={"prompt": "x"})
    next(event for event in running.iter_events() if isinstance(event, fal_client.InProgress))
    places = [_shown(waiting.status()), _shown(running.status())]
    waiting.cancel()
    fal_client.cancel("test/gate", running.request_id)
    _let_go(gate, 1)
    again = _failure(waiting.cancel)
    return {
        "places": places,
        "again": again,
        **{
            name: {"error": _failure(handle.get), "status": _shown(handle.status())}
            for name, handle in (("running", running), ("waiting", waiting))
        },
    }


async def cancel_async(gate: str) -> Any:
    """The same without blocking."""
    running = await fal_client.submit_async("test/gate", arguments={"prompt": gate})
    waiting = await fal_client.submit_async("test/null", arguments={"prompt": "x"})
    async for event in running.iter_events():
        if isinstance(event, fal_client.InProgress):
            break
    places = [_shown(await waiting.status()), _shown(await running.status())]
    await waiting.cancel()
    await fal_client.cancel_async("test/gate", running.request_id)
    _let_go(gate, 1)
    again = await _failure_async(waiting.cancel)
    return {
        "places": places,
        "again": again,
        **{
            name: {"error": await _failure_async(handle.get), "status": _shown(await handle.status())}
            for name, handle in (("running", running), ("waiting", waiting))
        },
    }


def bad(endpoint: str) -> Any:
    """How a request with two bad fields fails, each way."""
    arguments = {"prompt": 5, "num_images": 9}
    return [
        _failure(lambda: fal_client.run(endpoint, arguments=arguments)),
        _failure(lambda: fal_client.submit(endpoint, arguments=arguments)),
        _failure(lambda: fal_client.subscribe(endpoint, arguments=arguments)),
    ]


async def bad_async(endpoint: str) -> Any:
    """The same without blocking."""
    arguments = {"prompt": 5, "num_images": 9}
    return [
        await _failure_async(lambda: fal_client.run_async(endpoint, arguments=arguments)),
        await _failure_async(lambda: fal_client.submit_async(endpoint, arguments=arguments)),
        await _failure_async(lambda: fal_client.subscribe_async(endpoint, arguments=arguments)),
    ]


def late(gate: str) -> Any:
    """Requests that cannot start in time, because another holds the model."""
    holder = fal_client.submit("test/gate", arguments={"prompt": gate, "num_inference_steps": 1})
    next(event for event in holder.iter_events() if isinstance(event, fal_client.InProgress))
    handle = fal_client.submit("test/null", arguments={"prompt": "x"}, start_timeout=1.01)
    failures = [
        _failure(lambda: fal_client.run("test/null", arguments={"prompt": "x"}, start_timeout=1.01)),
        _failure(handle.get),
    ]
    _let_go(gate, 1)
    return {"failures": failures, "status": _shown(handle.status()), "holder": holder.get()}


def hello(endpoint: str) -> Any:
    """One picture, or why there is none."""
    return _failure(lambda: fal_client.run(endpoint, arguments={"prompt": "hello"}))


def uploads(folder: str) -> Any:
    """Where a text, a picture and a file of several parts are found once they were uploaded."""
    with Image.open(Path(folder) / "small.png") as picture:
        picture.load()
    return {
        "text": fal_client.upload(b"hello", "text/plain"),
        "picture": fal_client.upload_image(picture, "png"),
        "small": fal_client.upload_file(Path(folder) / "small.png"),
        "large": fal_client.upload_file(Path(folder) / "large.bin"),
    }


async def uploads_async(folder: str) -> Any:
    """The same without blocking, but for the large one."""
    return {
        "text": await fal_client.upload_async(b"hello", "text/plain"),
        "small": await fal_client.upload_file_async(Path(folder) / "small.png"),
    }


def pictures_in(path: str, hosted: str) -> Any:
    """What test/copy answers to a picture that comes in each way, and what it was told to fetch."""
    with Image.open(path) as picture:
        picture.load()
    ways = {
        "hosted": hosted,
        "data URI": fal_client.encode_image(picture, "png"),
        "data URI of a file": fal_client.encode_file(path),
        "uploaded": fal_client.upload_file(path),
        "uploaded image": fal_client.upload_image(picture, "png"),
    }
    return {name: _copied(url) for name, url in ways.items()}


def _copied(url: str) -> Any:
    arguments = {"prompt": "", "image_url": url, "output_format": "png"}
    return fal_client.subscribe("test/copy", arguments=arguments)


def realtime() -> Any:
    """Two pictures and a refusal in one session, and a picture in a session opened with the key itself."""
    with fal_client.realtime(FLUX, max_buffering=5) as session:
        answers = [_heard(session, APPLE), _heard(session, {"prompt": 5}), _heard(session, APPLE)]
    with fal_client.realtime(FLUX, use_jwt=False) as session:
        return [*answers, _heard(session, APPLE)]


async def realtime_async() -> Any:
    """The same without blocking."""
    async with fal_client.realtime_async(FLUX, max_buffering=5) as session:
        answers = [await _heard_async(session, fields) for fields in (APPLE, {"prompt": 5}, APPLE)]
    async with fal_client.realtime_async(FLUX, use_jwt=False) as session:
        return [*answers, await _heard_async(session, APPLE)]


def by_host(endpoint: str) -> Any:
    """Every way that is led by the host alone, and a refusal; uploads and realtime's tokens are led otherwise."""
    arguments = {"prompt": "a red apple", "seed": 7, "num_inference_steps": 2}
    with fal_client.realtime(endpoint, use_jwt=False) as session:
        heard = _heard(session, arguments)
    return {
        "run": fal_client.run(endpoint, arguments=arguments),
        "submit": fal_client.submit(endpoint, arguments=arguments).get(),
        "subscribe": fal_client.subscribe(endpoint, arguments=arguments, with_logs=True),
        "stream": list(fal_client.stream(endpoint, arguments=arguments))[-1],
        "realtime": heard,
        "error": _failure(lambda: fal_client.run(endpoint, arguments={"prompt": 5}))["status_code"],
    }


def hopeless(folder: str) -> Any:
    """How everything fails when there is no server."""
    attempts = {
        "run": lambda: fal_client.run(FLUX, arguments=APPLE),
        "submit": lambda: fal_client.submit(FLUX, arguments=APPLE),
        "subscribe": lambda: fal_client.subscribe(FLUX, arguments=APPLE),
        "stream": lambda: list(fal_client.stream(FLUX, arguments=APPLE)),
        "status": lambda: fal_client.status(FLUX, "0"),
        "upload": lambda: fal_client.upload(b"hello", "text/plain"),
        "large": lambda: fal_client.upload_file(Path(folder) / "large.bin"),
    }
    if hasattr(fal_client, "realtime"):
        attempts["realtime"] = lambda: fal_client.realtime(FLUX).__enter__()
        attempts["realtime with a key"] = lambda: fal_client.realtime(FLUX, use_jwt=False).__enter__()
    return {name: _whatever_fails(attempt) for name, attempt in attempts.items()}


def _whatever_fails(attempt: Any) -> str | None:
    try:
        attempt()
    except Exception as error:
        return type(error).__name__
    return None


def _heard(session: Any, fields: dict[str, Any]) -> Any:
    session.send(fields)
    try:
        return session.recv()
    except fal_client.client.RealtimeError as error:
        return error.payload


async def _heard_async(session: Any, fields: dict[str, Any]) -> Any:
    await session.send(fields)
    try:
        return await session.recv()
    except fal_client.client.RealtimeError as error:
        return error.payload


def _let_go(gate: str, steps: int) -> None:
    with Path(gate).open("w") as pipe:
        pipe.write("." * steps)


def _shown(event: Any) -> dict[str, Any]:
    return {"type": type(event).__name__, **vars(event)}


def _failure(call: Any) -> Any:
    try:
        return call()
    except fal_client.FalClientHTTPError as error:
        return _told(error)


async def _failure_async(call: Any) -> Any:
    try:
        return await call()
    except fal_client.FalClientHTTPError as error:
        return _told(error)


def _told(error: Any) -> dict[str, Any]:
    return {
        "message": error.message,
        "status_code": error.status_code,
        "error_type": error.error_type,
        "headers": error.response_headers,
    }


if __name__ == "__main__":
    answer = globals()[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(asyncio.run(answer) if asyncio.iscoroutine(answer) else answer))
