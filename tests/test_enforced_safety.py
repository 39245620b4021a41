"""With --enforce-safety-checker no spelling of a request gets a picture past the checker."""

import asyncio
import base64
import contextlib
import io
import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import msgpack
import pytest
import websockets
from PIL import Image

from tests.serving import TEST_MODELS, Server, serving

FIELD = "enable_safety_checker"
NAMES = [
    *(FIELD, FIELD.upper(), FIELD.title(), f" {FIELD}", f"{FIELD}\\u0000"),
    *("enableSafetyChecker", "safety_checker", "enable-safety-checker"),
]
VALUES = [
    *("false", '"false"', "0", '"0"', '"no"', '"off"', '"FALSE"', "null", "0.0", "-0", '""', '"n"'),
    *("[]", "{}", "[false]", "true"),
]
QUERIES = [{}, {FIELD: "false"}, {"sync_mode": "true", FIELD: "0"}]
HEADERS = [{}, {"x-enable-safety-checker": "false"}, {"X-Fal-Enable-Safety-Checker": "0"}, {"x-fal-store-io": "0"}]
DOORS = ["run", "stream", "proxy", "openai", "queue"]
#: Models whose checker flags everything, answers too little, or breaks, as the prompt says.
PROMPTS = ["x", "silent", "raises"]


@pytest.fixture(scope="module")
def enforced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("enforced"), TEST_MODELS, enforce_safety_checker="true") as server:
        yield server.ready()


def bodies() -> Iterator[str]:
    """JSON written by hand, because names twice and odd names are not what a library writes."""
    start = '"image_size": {"width": 64, "height": 64}, "num_inference_steps": 1'
    for name, value, prompt in itertools.product(NAMES, VALUES, PROMPTS):
        spelled = f'"prompt": "{prompt}", {start}'
        yield f'{{{spelled}, "{name}": {value}}}'
        yield f'{{"{name}": {value}, {spelled}, "{FIELD}": true, "{name}": {value}}}'
        yield f'{{{spelled}, "{name}": {value}, "sync_mode": true}}'


def variants(number: int) -> list[tuple[str, str, dict[str, str], dict[str, str]]]:
    """So many of all, the same each time."""
    every = list(itertools.product(DOORS, bodies(), QUERIES, HEADERS))
    return random.Random(5).sample(every, number)


def output_of(client: httpx.Client, door: str, body: str, query: dict[str, str], headers: dict[str, str]) -> Any:
    """What a client is given at last: the output, or an error."""
    content: dict[str, Any] = {"content": body, "headers": {"content-type": "application/json", **headers}}
    if door == "queue":
        submitted = client.post("/queue/test/unsafe", params=query, **content)
        if submitted.status_code != 200:
            return submitted.json()
        place = httpx.URL(submitted.json()["status_url"]).path
        with client.stream("GET", f"{place}/stream") as status:
            status.read()
        return client.get(place.removesuffix("/status")).json()
    if door == "stream":
        events: list[str] = []
        # One that fails is cut off after its last event.
        with (
            client.stream("POST", "/test/unsafe/stream", params=query, **content) as answer,
            contextlib.suppress(httpx.RemoteProtocolError),
        ):
            for line in answer.iter_lines():
                events += [line[6:]] if line.startswith("data: ") else []
        return json.loads(events[-1]) if events else {}
    if door == "proxy":
        content["headers"]["x-fal-target-url"] = str(httpx.URL("https://fal.run/test/unsafe", params=query))
        return client.post("/api/fal/proxy", **content).json()
    if door == "openai":
        content["content"] = body[:1] + '"model": "test/unsafe", ' + body[1:]
        return client.post("/v1/images/generations", params=query, **content).json()
    return client.post("/test/unsafe", params=query, **content).json()


def pictures(client: httpx.Client, output: Any) -> list[bytes]:
    """Every picture in an answer, by whatever door it came."""
    found = []
    for image in [*output.get("images", []), *output.get("data", [])]:
        if "b64_json" in image:
            found.append(base64.b64decode(image["b64_json"]))
        elif image["url"].startswith("data:"):
            found.append(base64.b64decode(image["url"].partition(",")[2]))
        else:
            found.append(client.get(httpx.URL(image["url"]).path).content)
    return found


def is_black(content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as picture:
        return picture.convert("L").getextrema()[1] == 0


def tried(server: Server, number: int) -> None:
    """So many variants; each ends in a black picture that is said to be flagged, or in an error."""
    painted = 0
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        for variant in variants(number):
            output = output_of(client, *variant)
            assert "preview" not in str(output)
            for content in pictures(client, output):
                painted += 1
                assert is_black(content), variant
            assert all(output.get("has_nsfw_concepts", [True])), variant
    # Enough of them are understood for this to say something.
    assert painted > number / 10


def test_no_spelling_gets_past_the_checker(enforced: Server) -> None:
    tried(enforced, 1_000)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_nor_do_many_more(enforced: Server) -> None:
    tried(enforced, 5_000)


@pytest.mark.parametrize("value", [False, 0, "false", None])
def test_nor_on_the_realtime_socket(enforced: Server, value: object) -> None:
    async def ask() -> Any:
        url = f"{enforced.url.replace('http', 'ws')}/test/unsafe/realtime"
        async with websockets.connect(url, proxy=None) as connection:
            body = {"prompt": "x", "image_size": {"width": 64, "height": 64}, FIELD: value, "sync_mode": True}
            await connection.send(msgpack.packb(body))
            while True:
                said = await connection.recv()
                told = msgpack.unpackb(said) if isinstance(said, bytes) else json.loads(said)
                if "images" in told or told.get("type") == "x-fal-error":
                    return told

    told = asyncio.run(ask())
    for image in told.get("images", []):
        content = image["content"] if "content" in image else base64.b64decode(image["url"].partition(",")[2])
        assert is_black(content)
    assert all(told.get("has_nsfw_concepts", [True]))
