"""Attacks that make the server store much for a client: rows, uploads, parts of uploads, and empty files."""

import itertools
import json
from functools import partial
from urllib.parse import urlsplit

import uvloop

from bench.attacks import ATTACKER, ROUNDS
from bench.attacks.attacker import Attack, Round, Target
from bench.attacks.connection import Response, connected, request

NUM_SUBMITS, NUM_UPLOADS, NUM_EMPTY = 2_500, 200, 5_000
#: The longest value tried for each field, in bytes.
LONGEST = {"prompt": 80_000, "host": 60_000, "hint": 60_000, "webhook": 60_000}
_AT_A_TIME = 32


# -- rows


def _submit(target: Target, **lengths: int) -> bytes:
    """Return a submit whose named fields have these lengths in bytes."""
    url = target.url("").ljust(lengths.get("webhook", 0), "a")
    query = f"?fal_webhook={url}" if "webhook" in lengths else ""
    headers = {}
    if "host" in lengths:
        headers["host"] = "a" * lengths["host"]
    if "hint" in lengths:
        headers["x_fal_runner_hint"] = "a" * lengths["hint"]
    # The limit of a prompt counts characters, so use a character of four bytes.
    fields = {"prompt": "\N{GRINNING FACE}" * (lengths.get("prompt", 0) // 4)}
    return target.post(f"/queue/bench/slow{query}", fields, **headers)


def _cancel(submitted: Response) -> bytes:
    return request("PUT", urlsplit(json.loads(submitted.body)["cancel_url"]).path, ATTACKER)


async def _exchange(target: Target, content: bytes) -> Response | None:
    """Send one request without counting the response; return it if there is one."""
    try:
        async with connected(target.port) as connection:
            return await connection.exchange(content)
    except (OSError, EOFError):
        return None


async def _longest_accepted(target: Target, field: str) -> int:
    """Find the length of the longest accepted value of a field by bisection, to 1 %; return 0 if none is accepted."""
    accepted, refused, tried = 0, LONGEST[field] + 1, LONGEST[field]
    while refused - accepted > 1 + accepted // 100:
        response = await _exchange(target, _submit(target, **{field: tried}))
        if response and response.is_good:
            await _exchange(target, _cancel(response))
            accepted = tried
        else:
            refused = tried
        tried = (accepted + refused) // 2
    return accepted


async def _all_longest(target: Target) -> dict[str, int]:
    return {field: length for field in LONGEST if (length := await _longest_accepted(target, field))}


def _rows(target: Target) -> Round:
    """Return a phase that submits and cancels requests with the longest prompt and one other field at its longest."""
    lengths = uvloop.run(_all_longest(target))
    target.responses.notes |= {
        "planned": NUM_SUBMITS,
        **{f"longest_{field}": length for field, length in lengths.items()},
    }
    prompt = {"prompt": lengths.pop("prompt", 0)}
    variants = [_submit(target, **prompt, **{field: length}) for field, length in lengths.items()] or [
        _submit(target, **prompt)
    ]
    submits = itertools.cycle(variants)

    async def submit_and_cancel(content: bytes) -> None:
        submitted = await target.ask(content, label="submit")
        if submitted and submitted.is_good:
            await target.ask(_cancel(submitted), label="cancel")

    return lambda: target.flood(itertools.islice(submits, NUM_SUBMITS // ROUNDS), _AT_A_TIME, submit_and_cancel)


# -- uploads


def uploads(target: Target, number: int, content: bytes) -> Round:
    """Return a phase that uploads its share of `number` files with this content."""
    target.responses.notes["planned"] = number
    upload = request("POST", "/files/upload", ATTACKER, content, content_type="image/png")
    return lambda: target.flood(itertools.repeat(upload, number // ROUNDS), _AT_A_TIME)


def _empty_parts(target: Target) -> Round:
    target.responses.notes["planned"] = NUM_EMPTY
    initiated = uvloop.run(_exchange(target, target.post("/storage/upload/initiate-multipart", {})))
    assert initiated, "the server did not answer the request to initiate a multipart upload"
    path = urlsplit(json.loads(initiated.body)["upload_url"]).path
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
        "200 files of 100 KB, with room for 20 MB",
        partial(uploads, number=NUM_UPLOADS, content=bytes(100_000)),
        {"retention_gb": "0.02"},
    ),
    Attack("empty-parts", "5,000 empty parts of one upload", _empty_parts),
    Attack("empty-files", "5,000 empty files", _empty_files),
    # The rate limit also allows the other key only one request, so that key only polls the status of this request.
    Attack(
        "empty-files-rate",
        "5,000 empty files, at one request a day",
        _empty_files,
        {"rate_per_key": "1/day"},
        ("status",),
    ),
)
