"""A program that calls fal-client: `python -m tests.support.fal_client_calls CALL ARGUMENT...` prints JSON."""

import asyncio
import importlib.metadata
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import fal_client
from PIL import Image

#: Small, so that the demo weights generate it in a moment.
APPLE = {"prompt": "a red apple", "seed": 7, "image_size": "square", "num_inference_steps": 4}
FLUX = "fal-ai/flux/dev"


def version() -> Any:
    """Return the version and the directory of the fal-client in use."""
    return [importlib.metadata.version("fal-client"), str(Path(fal_client.__file__).parent)]


def everyday() -> Any:
    """Generate the same image with each blocking call; return all results and events."""
    updates: list[Any] = []
    enqueued: list[str] = []
    handle = fal_client.submit(FLUX, arguments=APPLE)
    events = [_event_fields(event) for event in handle.iter_events(with_logs=True)]
    return {
        "run": fal_client.run(FLUX, arguments=APPLE),
        "submit": handle.get(),
        "events": events,
        "subscribe": fal_client.subscribe(
            FLUX, arguments=APPLE, with_logs=True, on_enqueue=enqueued.append, on_queue_update=updates.append
        ),
        "updates": [_event_fields(update) for update in updates],
        "enqueued": enqueued,
        "stream": list(fal_client.stream(FLUX, arguments=APPLE)),
        "status": _event_fields(fal_client.status(FLUX, handle.request_id, with_logs=True)),
        "result": fal_client.result(FLUX, handle.request_id),
    }


async def everyday_async() -> Any:
    """Do what `everyday` does, with the asynchronous calls."""
    updates: list[Any] = []
    enqueued: list[str] = []
    handle = await fal_client.submit_async(FLUX, arguments=APPLE)
    events = [_event_fields(event) async for event in handle.iter_events(with_logs=True)]
    return {
        "run": await fal_client.run_async(FLUX, arguments=APPLE),
        "submit": await handle.get(),
        "events": events,
        "subscribe": await fal_client.subscribe_async(
            FLUX, arguments=APPLE, with_logs=True, on_enqueue=enqueued.append, on_queue_update=updates.append
        ),
        "updates": [_event_fields(update) for update in updates],
        "enqueued": enqueued,
        "stream": [event async for event in fal_client.stream_async(FLUX, arguments=APPLE)],
        "status": _event_fields(await fal_client.status_async(FLUX, handle.request_id, with_logs=True)),
        "result": await fal_client.result_async(FLUX, handle.request_id),
    }


def every_endpoint(path: str) -> Any:
    """Call each endpoint in a JSON file of inputs, and stream those that end in /stream too; return all outputs."""
    inputs = json.loads(Path(path).read_text(encoding="utf-8"))
    return {endpoint: _failure(partial(_outputs, endpoint, body)) for endpoint, body in inputs.items()}


def _outputs(endpoint: str, arguments: Any) -> dict[str, Any]:
    outputs = {"subscribe": fal_client.subscribe(endpoint, arguments=arguments)}
    if endpoint.endswith("/stream"):
        *_, outputs["stream"] = fal_client.stream(endpoint, arguments=arguments, path="")
        # By default, fal-client adds /stream to the endpoint once more.
        *_, outputs["stream of the stream"] = fal_client.stream(endpoint, arguments=arguments)
    return outputs


def watch(gate: str) -> Any:
    """Collect the events of a request that takes one step after each IN_PROGRESS event."""
    handle = fal_client.submit("test/gate", arguments={"prompt": gate, "num_inference_steps": 2})
    events = []
    for event in handle.iter_events(with_logs=True):
        events.append(_event_fields(event))
        if isinstance(event, fal_client.InProgress):
            _release_steps(gate, 1)
    return events


def cancel(gate: str) -> Any:
    """Cancel a running request and one that waits behind it; return their statuses before and after, and all errors."""
    running = fal_client.submit("test/gate", arguments={"prompt": gate})
    waiting = fal_client.submit("test/null", arguments={"prompt": "x"})
    next(event for event in running.iter_events() if isinstance(event, fal_client.InProgress))
    positions = [_event_fields(waiting.status()), _event_fields(running.status())]
    waiting.cancel()
    fal_client.cancel("test/gate", running.request_id)
    _release_steps(gate, 1)
    second_cancel = _failure(waiting.cancel)
    return {
        "places": positions,
        "again": second_cancel,
        **{
            name: {"error": _failure(handle.get), "status": _event_fields(handle.status())}
            for name, handle in (("running", running), ("waiting", waiting))
        },
    }


async def cancel_async(gate: str) -> Any:
    """Do what `cancel` does, with the asynchronous calls."""
    running = await fal_client.submit_async("test/gate", arguments={"prompt": gate})
    waiting = await fal_client.submit_async("test/null", arguments={"prompt": "x"})
    async for event in running.iter_events():
        if isinstance(event, fal_client.InProgress):
            break
    positions = [_event_fields(await waiting.status()), _event_fields(await running.status())]
    await waiting.cancel()
    await fal_client.cancel_async("test/gate", running.request_id)
    _release_steps(gate, 1)
    second_cancel = await _failure_async(waiting.cancel)
    return {
        "places": positions,
        "again": second_cancel,
        **{
            name: {"error": await _failure_async(handle.get), "status": _event_fields(await handle.status())}
            for name, handle in (("running", running), ("waiting", waiting))
        },
    }


def bad(endpoint: str) -> Any:
    """Send a request with two invalid fields by each call; return the errors."""
    arguments = {"prompt": 5, "num_images": 9}
    return [
        _failure(lambda: fal_client.run(endpoint, arguments=arguments)),
        _failure(lambda: fal_client.submit(endpoint, arguments=arguments)),
        _failure(lambda: fal_client.subscribe(endpoint, arguments=arguments)),
    ]


async def bad_async(endpoint: str) -> Any:
    """Do what `bad` does, with the asynchronous calls."""
    arguments = {"prompt": 5, "num_images": 9}
    return [
        await _failure_async(lambda: fal_client.run_async(endpoint, arguments=arguments)),
        await _failure_async(lambda: fal_client.submit_async(endpoint, arguments=arguments)),
        await _failure_async(lambda: fal_client.subscribe_async(endpoint, arguments=arguments)),
    ]


def late(gate: str) -> Any:
    """Send two requests that cannot start in time, because a third one occupies the server; return the outcomes."""
    holder = fal_client.submit("test/gate", arguments={"prompt": gate, "num_inference_steps": 1})
    next(event for event in holder.iter_events() if isinstance(event, fal_client.InProgress))
    handle = fal_client.submit("test/null", arguments={"prompt": "x"}, start_timeout=1.01)
    failures = [
        _failure(lambda: fal_client.run("test/null", arguments={"prompt": "x"}, start_timeout=1.01)),
        _failure(handle.get),
    ]
    _release_steps(gate, 1)
    return {"failures": failures, "status": _event_fields(handle.status()), "holder": holder.get()}


def hello(endpoint: str) -> Any:
    """Generate one image; return the output or the error."""
    return _failure(lambda: fal_client.run(endpoint, arguments={"prompt": "hello"}))


def uploads(directory: str) -> Any:
    """Upload a text, an image, a file and a file of several parts; return their URLs."""
    with Image.open(Path(directory) / "small.png") as image:
        image.load()
    return {
        "text": fal_client.upload(b"hello", "text/plain"),
        "image": fal_client.upload_image(image, "png"),
        "small": fal_client.upload_file(Path(directory) / "small.png"),
        "large": fal_client.upload_file(Path(directory) / "large.bin"),
    }


async def uploads_async(directory: str) -> Any:
    """Upload the text and the small file with the asynchronous calls; return their URLs."""
    return {
        "text": await fal_client.upload_async(b"hello", "text/plain"),
        "small": await fal_client.upload_file_async(Path(directory) / "small.png"),
    }


def image_inputs(path: str, hosted: str) -> Any:
    """Send an image to test/copy in each possible form; return each output."""
    with Image.open(path) as image:
        image.load()
    urls = {
        "hosted": hosted,
        "data URI": fal_client.encode_image(image, "png"),
        "data URI of a file": fal_client.encode_file(path),
        "uploaded": fal_client.upload_file(path),
        "uploaded image": fal_client.upload_image(image, "png"),
    }
    return {name: _copied(url) for name, url in urls.items()}


def _copied(url: str) -> Any:
    arguments = {"prompt": "", "image_url": url, "output_format": "png"}
    return fal_client.subscribe("test/copy", arguments=arguments)


def realtime() -> Any:
    """Send three requests in a session, the second invalid, and one in a session without token; return the answers."""
    with fal_client.realtime(FLUX, max_buffering=5) as session:
        answers = [_received(session, APPLE), _received(session, {"prompt": 5}), _received(session, APPLE)]
    with fal_client.realtime(FLUX, use_jwt=False) as session:
        return [*answers, _received(session, APPLE)]


async def realtime_async() -> Any:
    """Do what `realtime` does, with the asynchronous calls."""
    async with fal_client.realtime_async(FLUX, max_buffering=5) as session:
        answers = [await _received_async(session, fields) for fields in (APPLE, {"prompt": 5}, APPLE)]
    async with fal_client.realtime_async(FLUX, use_jwt=False) as session:
        return [*answers, await _received_async(session, APPLE)]


def by_host(endpoint: str) -> Any:
    """Make each call that FAL_RUN_HOST and FAL_QUEUE_RUN_HOST redirect, and one call with an invalid field.

    Returns the results. There is no upload and no realtime token, because these variables do not redirect them.
    """
    arguments = {"prompt": "a red apple", "seed": 7, "num_inference_steps": 2}
    with fal_client.realtime(endpoint, use_jwt=False) as session:
        realtime_output = _received(session, arguments)
    return {
        "run": fal_client.run(endpoint, arguments=arguments),
        "submit": fal_client.submit(endpoint, arguments=arguments).get(),
        "subscribe": fal_client.subscribe(endpoint, arguments=arguments, with_logs=True),
        "stream": list(fal_client.stream(endpoint, arguments=arguments))[-1],
        "realtime": realtime_output,
        "error": _failure(lambda: fal_client.run(endpoint, arguments={"prompt": 5}))["status_code"],
    }


def hopeless(directory: str) -> Any:
    """Make each call while no server runs; return the class name of each error."""
    calls = {
        "run": lambda: fal_client.run(FLUX, arguments=APPLE),
        "submit": lambda: fal_client.submit(FLUX, arguments=APPLE),
        "subscribe": lambda: fal_client.subscribe(FLUX, arguments=APPLE),
        "stream": lambda: list(fal_client.stream(FLUX, arguments=APPLE)),
        "status": lambda: fal_client.status(FLUX, "0"),
        "upload": lambda: fal_client.upload(b"hello", "text/plain"),
        "large": lambda: fal_client.upload_file(Path(directory) / "large.bin"),
    }
    if hasattr(fal_client, "realtime"):
        calls["realtime"] = lambda: fal_client.realtime(FLUX).__enter__()
        calls["realtime with a key"] = lambda: fal_client.realtime(FLUX, use_jwt=False).__enter__()
    return {name: _error_name(call) for name, call in calls.items()}


def _error_name(call: Any) -> str | None:
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return None


def _received(session: Any, fields: dict[str, Any]) -> Any:
    session.send(fields)
    try:
        return session.recv()
    except fal_client.client.RealtimeError as error:
        return error.payload


async def _received_async(session: Any, fields: dict[str, Any]) -> Any:
    await session.send(fields)
    try:
        return await session.recv()
    except fal_client.client.RealtimeError as error:
        return error.payload


def _release_steps(gate: str, steps: int) -> None:
    with Path(gate).open("w") as pipe:
        pipe.write("." * steps)


def _event_fields(event: Any) -> dict[str, Any]:
    return {"type": type(event).__name__, **vars(event)}


def _failure(call: Any) -> Any:
    try:
        return call()
    except fal_client.FalClientHTTPError as error:
        return _error_fields(error)


async def _failure_async(call: Any) -> Any:
    try:
        return await call()
    except fal_client.FalClientHTTPError as error:
        return _error_fields(error)


def _error_fields(error: Any) -> dict[str, Any]:
    return {
        "message": error.message,
        "status_code": error.status_code,
        "error_type": error.error_type,
        "headers": error.response_headers,
    }


if __name__ == "__main__":
    result = globals()[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(asyncio.run(result) if asyncio.iscoroutine(result) else result))
