"""Attacks with request bodies and WebSocket frames that are sent without their last byte, and held open."""

import asyncio
import struct
from functools import partial

from bench.attacks import ATTACKER
from bench.attacks.attacker import Attack, Round, Target
from bench.attacks.connection import Connection, head

LARGE_BODY, SMALL_BODY, FRAME = 37_000_000, 60_000, 34_000_000
#: Bytes a second of a slow body.
SLOW_RATE = 20_000
_UPGRADE = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec_websocket_version": "13",
    "sec_websocket_key": "AAAAAAAAAAAAAAAAAAAAAA==",
}
#: The start of a masked binary frame whose length follows in eight bytes. The mask of zeros changes no payload.
_LONG_FRAME, _MASK = b"\x82\xff", bytes(4)


def bodies(target: Target, number: int, length: int, rate: float = 0.0) -> Round:
    """Return a phase that sends `number` bodies of `length` bytes at once, each without its last byte."""
    request_head = head("POST", "/queue/bench/null", ATTACKER, length)
    # A body of white space is JSON that is not complete yet.
    body = memoryview(b" " * (length - 1))

    async def act() -> None:
        await asyncio.gather(*(target.ask(request_head, body, rate=rate) for _ in range(number)))

    return act


def _frames(target: Target, number: int) -> Round:
    upgrade = head("GET", "/bench/null/realtime", ATTACKER, 0, **_UPGRADE)
    frame = memoryview(_LONG_FRAME + struct.pack(">Q", FRAME) + _MASK + b" " * (FRAME - 1))

    async def conversation(connection: Connection) -> str:
        response = await connection.exchange(upgrade)
        if response.status != 101:
            return str(response.status)
        return f"closed by {await connection.closed(frame)}"

    async def act() -> None:
        await asyncio.gather(*(target.talk(conversation) for _ in range(number)))

    return act


ATTACKS = (
    Attack(
        "bodies-37mb", "50 bodies of 37 MB without their last byte, held", partial(bodies, number=50, length=LARGE_BODY)
    ),
    Attack("frames-34mb", "20 realtime frames of 34 MB without their last byte, held", partial(_frames, number=20)),
    Attack(
        "bodies-60kb",
        "200 bodies of 60 KB without their last byte, held",
        partial(bodies, number=200, length=SMALL_BODY),
    ),
    Attack(
        "bodies-slow",
        "50 bodies of 37 MB at 20 KB a second each",
        partial(bodies, number=50, length=LARGE_BODY, rate=SLOW_RATE),
    ),
)
