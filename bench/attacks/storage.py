"""What the server keeps for a client: rows, uploads, parts of them, and files of no bytes at all."""

import itertools
import json
from functools import partial
from urllib.parse import urlsplit

import uvloop

from bench.attacks import ATTACKER, ROUNDS
from bench.attacks.attacker import Attack, Round, Target
from bench.attacks.connection import Answer, connected, request

NUM_SUBMITS, NUM_UPLOADS, NUM_EMPTY = 2_500, 200, 5_000
#: How long each of these is tried at most, in bytes.
LONGEST = {"prompt": 80_000, "host": 60_000, "hint": 60_000, "webhook": 60_000}
_AT_A_TIME = 32


# -- rows


def _submit(target: Target, **lengths: int) -> bytes:
    """A submit in which each of these is so long."""
    address = target.address("").ljust(lengths.get("webhook", 0), "a")
    query = f"?fal_webhook={address}" if "webhook" in lengths else ""
    headers = {}
    if "host" in lengths:
        headers["host"] = "a" * lengths["host"]
    if "hint" in lengths:
        headers["x_fal_runner_hint"] = "a" * lengths["hint"]
    # Four bytes each: a prompt is bounded in characters.
    fields = {"prompt": "\N{GRINNING FACE}" * (lengths.get("prompt", 0) // 4)}
    return target.post(f"/queue/bench/slow{query}", fields, **headers)


def _cancel(submitted: Answer) -> bytes:
    return request("PUT", urlsplit(json.loads(submitted.body)["cancel_url"]).path, ATTACKER)


async def _exchange(target: Target, content: bytes) -> Answer | None:
    """The answer to one request that counts for nothing, if there is one."""
    try:
        async with connected(target.port) as connection:
            return await connection.exchange(content)
    except (OSError, EOFError):
        return None


async def _longest_accepted(target: Target, what: str) -> int:
    """How long this may be, to a hundredth, by halving; 0 when it is not accepted at all."""
    accepted, refused, tried = 0, LONGEST[what] + 1, LONGEST[what]
    while refused - accepted > 1 + accepted // 100:
        answer = await _exchange(target, _submit(target, **{what: tried}))
        if answer and answer.is_good:
            await _exchange(target, _cancel(answer))
            accepted = tried
        else:
            refused = tried
        tried = (accepted + refused) // 2
    return accepted


async def _all_longest(target: Target) -> dict[str, int]:
    return {what: length for what in LONGEST if (length := await _longest_accepted(target, what))}


def _rows(target: Target) -> Round:
    """Each submit has the longest prompt, and one of the others as long as it may be."""
    lengths = uvloop.run(_all_longest(target))
    target.told.notes |= {"planned": NUM_SUBMITS, **{f"longest_{what}": length for what, length in lengths.items()}}
    prompt = {"prompt": lengths.pop("prompt", 0)}
    kinds = [_submit(target, **prompt, **{what: length}) for what, length in lengths.items()] or [
        _submit(target, **prompt)
    ]
    submits = itertools.cycle(kinds)

    async def submit_and_cancel(content: bytes) -> None:
        submitted = await target.ask(content, label="submit")
        if submitted and submitted.is_good:
            await target.ask(_cancel(submitted), label="cancel")

    return lambda: target.flood(itertools.islice(submits, NUM_SUBMITS // ROUNDS), _AT_A_TIME, submit_and_cancel)


# -- uploads


def uploads(target: Target, number: int, content: bytes) -> Round:
    """So many files with this content."""
    target.told.notes["planned"] = number
    upload = request("POST", "/files/upload", ATTACKER, content, content_type="image/png")
    return lambda: target.flood(itertools.repeat(upload, number // ROUNDS), _AT_A_TIME)


def _empty_parts(target: Target) -> Round:
    target.told.notes["planned"] = NUM_EMPTY
    begun = uvloop.run(_exchange(target, target.post("/storage/upload/initiate-multipart", {})))
    assert begun, "no upload can be begun"
    path = urlsplit(json.loads(begun.body)["upload_url"]).path
    puts = (request("PUT", f"{path}/{number}", ATTACKER) for number in range(1, NUM_EMPTY + 1))
    return lambda: target.flood(itertools.islice(puts, NUM_EMPTY // ROUNDS), _AT_A_TIME)


_empty_files = partial(uploads, number=NUM_EMPTY, content=b"")

ATTACKS = (
    Attack(
        "rows",
        "2,500 submits with the longest prompt, and the longest host, runner hint or webhook, cancelled at once",
        _rows,
        {"retention_gb": "0.05", "outbound_allow": "127.0.0.1"},
    ),
    Attack(
        "uploads",
        "200 files of 100 KB, where 20 MB are kept",
        partial(uploads, number=NUM_UPLOADS, content=bytes(100_000)),
        {"retention_gb": "0.02"},
    ),
    Attack("empty-parts", "5,000 parts of no bytes of one upload", _empty_parts),
    Attack("empty-files", "5,000 files of no bytes", _empty_files),
    # The other key may send one request too, so that it only asks for its status.
    Attack("empty-files-rate", "the same at one request a day", _empty_files, {"rate_per_key": "1/day"}, ("status",)),
)
