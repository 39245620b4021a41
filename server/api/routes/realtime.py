"""fal's realtime API: inputs and outputs as msgpack over one WebSocket, control messages as JSON text."""

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgpack
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic_core import to_json

from models.base import Model
from models.schema import ImageInput
from server.api import submissions
from server.api.dependencies import Services, authenticate_with_token, open_output
from server.api.headers import number
from server.api.wait import cancel_on_disconnect
from server.errors import BadRequest, InvalidInput, ServerError, TooManyRequests, Unauthorized
from server.inputs.resolver import MAX_INPUT_BYTES, dump_input
from server.net.fair_share import FairShare
from server.net.websocket import count_messages
from server.queue.jobs import Job, Mode, State, Submission
from server.storage.file_store import Lifecycle

log = logging.getLogger(__name__)
router = APIRouter()

#: Default and maximum number of waiting inputs, as at fal.
MAX_BUFFERING = 60
#: Seconds without an input after which a session ends, as at fal.
IDLE_SECONDS = 600.0
_UNAUTHORIZED, _IDLE = 1008, 1000
#: Frames with more bytes than this are parsed in a thread.
_LARGE = 2**16
#: Maximum lists and maps in a msgpack frame, and maximum items in each. Without these limits, one byte of a frame could
#: take 70 bytes of memory.
_MAX_PARTS = 1024


@router.websocket("/{endpoint:path}/realtime")
async def realtime(socket: WebSocket, endpoint: str) -> None:
    """Run one session, which generates from one input after the other.

    If the buffer is full, a new input replaces the oldest. If the key is revoked, the session ends at the next input.
    """
    services = cast(Services, socket.app.state.services)
    if endpoint not in services.models:
        await socket.close(1008, "There is no such endpoint")
        return
    await socket.accept()
    try:
        owner = authenticate_with_token(socket, endpoint)
        count_messages(socket.scope, owner, services.in_flight)
        session = _Session(socket, services, services.models[endpoint], owner, _max_buffering(socket.query_params))
    except Unauthorized:
        await _reject(socket)
    except BadRequest as error:
        await _send_error(socket, "BAD_REQUEST", str(error))
        await socket.close(1008)
    else:
        await _serve(socket, session, services.open_answers, owner)


async def _serve(socket: WebSocket, session: "_Session", open_answers: FairShare, owner: str) -> None:
    try:
        with open_answers.held(owner):
            await session.serve()
    except TooManyRequests as error:
        await _send_error(socket, "UNAVAILABLE", str(error))
        await socket.close(1013)


@dataclass(frozen=True)
class _Frame:
    """A frame as the client sent it. A frame is parsed only when its turn comes: many are dropped before that."""

    content: bytes
    is_text: bool

    @property
    def size(self) -> int:
        """The number of bytes in the frame."""
        return len(self.content)

    def to_json(self) -> bytes:
        """Convert the frame to JSON. Raises InvalidInput if a binary frame cannot be converted."""
        if self.is_text:
            return self.content
        counter = itertools.count()

        def count(part: Any) -> Any:
            if next(counter) >= _MAX_PARTS:
                raise ValueError("too many lists and maps")
            return part

        limits = {"max_array_len": _MAX_PARTS, "max_map_len": _MAX_PARTS}
        try:
            fields = msgpack.unpackb(self.content, object_hook=count, list_hook=count, **limits)
            return to_json(fields, inf_nan_mode="constants", bytes_mode="base64")
        except (ValueError, msgpack.UnpackException, RecursionError):
            message = f"Invalid msgpack, or more than {_MAX_PARTS:,} lists and maps, or items in one of these"
            raise InvalidInput.of("msgpack_invalid", ("body",), message) from None


class _Session:
    """A connection with a short buffer of inputs: one task fills the buffer, and another generates from it."""

    def __init__(self, socket: WebSocket, services: Services, model: Model, owner: str, max_buffering: int) -> None:
        self._socket = socket
        self._services = services
        self._model = model
        self._owner = owner
        self._inputs: deque[_Frame] = deque()
        self._max_buffering = max_buffering
        self._arrived = asyncio.Event()
        self._is_running = False

    async def serve(self) -> None:
        task = asyncio.create_task(self._generate())
        try:
            await self._read()
        except (WebSocketDisconnect, RuntimeError):
            # Starlette raises RuntimeError if the client disconnects during a send.
            return
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            while self._inputs:
                self._drop_oldest()

    async def _read(self) -> None:
        while True:
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    message = await self._socket.receive()
            except TimeoutError:
                if self._is_running:
                    continue
                await _send_error(self._socket, "TIMEOUT", "no inputs, reconnect when needed!")
                await self._socket.close(_IDLE)
                return
            if message["type"] == "websocket.disconnect":
                return
            if not self._services.keys.is_active(self._owner):
                await _reject(self._socket)
                return
            try:
                self._buffer(_frame(message))
            except TooManyRequests as error:
                await _send_error(self._socket, "UNAVAILABLE", str(error))

    def _buffer(self, frame: _Frame) -> None:
        """Add a frame to the buffer. Drop the oldest frames if the buffer is full or would exceed MAX_INPUT_BYTES.

        Raises TooManyRequests if the key has too many bytes in flight.
        """
        while self._inputs and (
            len(self._inputs) == self._max_buffering
            or sum(each.size for each in self._inputs) + frame.size > MAX_INPUT_BYTES
        ):
            self._drop_oldest()
        self._services.in_flight.acquire(self._owner, frame.size)
        self._inputs.append(frame)
        self._arrived.set()

    def _drop_oldest(self) -> None:
        self._services.in_flight.release(self._owner, self._inputs.popleft().size)

    async def _generate(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._inputs:
                self._is_running = True
                frame = self._inputs.popleft()
                try:
                    await self._try_answer(frame)
                finally:
                    self._services.in_flight.release(self._owner, frame.size)
                self._is_running = False

    async def _try_answer(self, frame: _Frame) -> None:
        try:
            await self._answer(frame)
        except InvalidInput as error:
            await _send_error(self._socket, "INVALID_INPUT", str(error))
        except ServerError as error:
            await _send_error(self._socket, "UNAVAILABLE", str(error))
        except (WebSocketDisconnect, RuntimeError):
            # The client disconnected during the response. `_read` also notices this, and ends the session.
            return
        except Exception:
            log.exception("a realtime request failed")
            await _send_error(self._socket, "INTERNAL_ERROR", "Internal Server Error")

    async def _answer(self, frame: _Frame) -> None:
        is_large = len(frame.content) > _LARGE
        fields = (
            await self._services.executor.run(self._owner, self._fields, frame) if is_large else self._fields(frame)
        )
        self._services.rate_limiter.acquire(self._owner)
        inputs = await self._services.inputs.resolve(fields, self._owner)
        job = await self._submit(dump_input(fields, inputs), inputs)
        with cancel_on_disconnect(self._services, job), self._services.notifier.subscribe(job.request_id) as event:
            while job.state != State.COMPLETED and not self._services.notifier.is_closing:
                event.clear()
                await event.wait()
        if job.error is not None or job.state != State.COMPLETED:
            await _send_error(self._socket, "INTERNAL_ERROR", job.error or "The server is stopping.")
            return
        async with open_output(self._services, job) as (_, output):
            await self._socket.send_bytes(await self._services.executor.run(self._owner, msgpack.packb, output))
            # This send blocks until the client has read most of the output.
            timing = {"type": "x-fal-message", "action": "timings", "timing": job.inference_time}
            await self._socket.send_text(to_json(timing).decode())

    def _fields(self, frame: _Frame) -> ImageInput:
        return submissions.validate(self._model, frame.to_json(), "", self._services.inputs.limits)

    async def _submit(self, text: str, inputs: Mapping[str, str]) -> Job:
        """Submit the job and return it. Cancel it if the client disconnects while the database writes it."""
        queue, executor = self._services.queue, self._services.executor
        submitting = asyncio.ensure_future(executor.run(self._owner, queue.submit, self._submission(text, inputs)))
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:
            await asyncio.to_thread(queue.cancel, await submitting)
            raise

    def _submission(self, text: str, inputs: Mapping[str, str]) -> Submission:
        return Submission(
            endpoint=self._model.endpoint,
            owner=self._owner,
            input=text,
            input_files=inputs,
            base_url=self._socket.state.base_url,
            mode=Mode.REALTIME,
            lifecycle=Lifecycle(),
        )


def _max_buffering(parameters: Mapping[str, str]) -> int:
    text = parameters.get("max_buffering")
    if text is None:
        return MAX_BUFFERING
    count = number(text, "max_buffering", 1)
    if count > MAX_BUFFERING:
        raise BadRequest(f"max_buffering should be at most {MAX_BUFFERING}, not {count:g}")
    return int(count)


def _frame(message: Mapping[str, Any]) -> _Frame:
    text = message.get("text")
    return _Frame(message["bytes"], is_text=False) if text is None else _Frame(text.encode(), is_text=True)


async def _reject(socket: WebSocket) -> None:
    # @fal-ai/client discards its token when it receives this message.
    await socket.send_json({"status": "error", "error": "Unauthorized"})
    await socket.close(_UNAUTHORIZED)


async def _send_error(socket: WebSocket, code: str, reason: str) -> None:
    await socket.send_text(to_json({"type": "x-fal-error", "error": code, "reason": reason}).decode())
