"""Responses and events of OpenAI's images API, built from the outcomes of jobs."""

import base64
import io
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import PIL.Image
from pydantic_core import from_json

from server.api.dependencies import Services, open_output
from server.api.openai.errors import error_body, failure_body, failure_response
from server.api.openai.requests import Encoding
from server.api.responses import FalJSONResponse
from server.api.sse import AbortStream, wait_or_heartbeat
from server.errors import InternalError
from server.queue.jobs import Job, Outcome, State

#: Token counts of zero, because OpenAI's package requires token counts.
_NO_USAGE = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}


def images_response(outcome: Outcome, path: str, encoding: Encoding | None) -> FalJSONResponse:
    """Build the response of a finished job; with `encoding`, encode its PNG images again.

    `path` is the path of the request.
    """
    if outcome.status != 200:
        return failure_response(outcome, path)
    images = from_json(outcome.body)["images"]
    data = [_datum(image["url"], encoding) for image in images]
    return FalJSONResponse({"created": int(time.time()), "data": data})


async def events(
    services: Services, job: Job, path: str, num_partial: int, encoding: Encoding | None
) -> AsyncIterator[Mapping[str, Any] | None]:
    """Yield up to `num_partial` partial images, evenly spread over the steps, then each final image.

    `path` is the path of the request. None stands for a heartbeat. After a failure, yields an error and raises
    AbortStream.
    """
    # The path .../edits, for example, has the event image_edit.completed.
    name = f"image_{path.rpartition('/')[2].removesuffix('s')}"
    num_sent, last_preview = 0, None
    with services.notifier.subscribe(job.request_id) as event:
        while job.state != State.COMPLETED:
            event.clear()
            preview, is_due = job.preview, job.step * (num_partial + 1) >= (num_sent + 1) * job.num_steps
            if num_sent < num_partial and preview is not None and preview is not last_preview and is_due:
                yield _event(f"{name}.partial_image", _base64(preview), "jpeg", partial_image_index=num_sent)
                num_sent, last_preview = num_sent + 1, preview
            if services.notifier.is_closing:
                yield {"type": "error", **error_body(InternalError("The server is stopping."), path)}
                raise AbortStream
            if not await wait_or_heartbeat(event):
                yield None
    async with open_output(services, job) as (outcome, output):
        if outcome.status != 200:
            yield {"type": "error", **failure_body(outcome, path)}
            raise AbortStream
        for image in output["images"]:
            datum = await services.executor.run(job.owner, _datum, image["url"], encoding)
            kind = encoding.format if encoding else image["content_type"].removeprefix("image/")
            size = f"{image['width']}x{image['height']}"
            yield _event(f"{name}.completed", datum["b64_json"], kind, size=size, usage=_NO_USAGE)


def _datum(url: str, encoding: Encoding | None) -> dict[str, str]:
    """Build an image's entry, with either `url` or `b64_json`; the other field is absent, not null."""
    if not url.startswith("data:"):
        return {"url": url}
    content = _base64(url)
    return {"b64_json": _encode(content, encoding) if encoding else content}


def _base64(data_uri: str) -> str:
    return data_uri.partition(",")[2]


def _encode(png: str, encoding: Encoding) -> str:
    """Encode a PNG again, both in base64. The XMP metadata, which marks the image as AI generated, is kept."""
    buffer = io.BytesIO()
    with PIL.Image.open(io.BytesIO(base64.b64decode(png))) as image:
        image.save(buffer, encoding.format.upper(), quality=encoding.quality, xmp=image.info.get("xmp", b""))
    return base64.b64encode(buffer.getvalue()).decode()


def _event(name: str, content: str, output_format: str, **more: Any) -> dict[str, Any]:
    """Build one of OpenAI's events; fields without a meaning here have OpenAI's defaults."""
    fields = {"created_at": int(time.time()), "size": "auto", "quality": "auto", "background": "opaque", **more}
    return {"type": name, "b64_json": content, "output_format": output_format, **fields}
