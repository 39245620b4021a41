"""With --enforce-safety-checker no spelling of a request gets a picture past the checker."""

import base64
import contextlib
import io
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
from PIL import Image
from websockets.sync.client import connect

from server.worker.watchdog import EXIT_STUCK
from tests.clients.test_realtime import heard
from tests.reliability.test_kill import client_of, rows, submit
from tests.support.server_process import TEST_MODELS, Gate, Server, completed, serving
from tests.unit.worker.test_watchdog import STRIKES, exit_code

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
DOORS = ["run", "stream", "proxy", "openai", "queue", "realtime"]
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
    if door == "realtime":
        return over_realtime(client, body, query, headers)
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


def over_realtime(client: httpx.Client, body: str | bytes, query: dict[str, str], headers: dict[str, str]) -> Any:
    """What one input of a session is answered."""
    url = client.base_url.join("/test/unsafe/realtime").copy_with(scheme="ws", params=query)
    with connect(str(url), additional_headers=headers, proxy=None, open_timeout=60, max_size=None) as socket:
        socket.send(body)
        return heard(socket)


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
    painted = Counter[str]()
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        for variant in variants(number):
            output = output_of(client, *variant)
            assert "preview" not in str(output)
            for content in pictures(client, output):
                painted[variant[0]] += 1
                assert is_black(content), variant
            assert all(output.get("has_nsfw_concepts", [True])), variant
    # Enough of them are understood, by each door, for this to say something.
    assert min(painted[door] for door in DOORS) > number / 100, painted


def test_no_spelling_gets_past_the_checker(enforced: Server) -> None:
    tried(enforced, 1_000)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_nor_do_many_more(enforced: Server) -> None:
    tried(enforced, 5_000)


@pytest.mark.parametrize("value", [False, 0, "false", None])
def test_nor_does_msgpack(enforced: Server, value: object) -> None:
    body = {"prompt": "x", "image_size": {"width": 64, "height": 64}, FIELD: value, "sync_mode": True}
    with httpx.Client(base_url=enforced.url, timeout=60, trust_env=False) as client:
        told = over_realtime(client, msgpack.packb(body), {}, {})
        assert all(is_black(content) for content in pictures(client, told))
    assert "images" in told or told["type"] == "x-fal-error"
    assert all(told.get("has_nsfw_concepts", [True]))


#: Checked on the worker's thread, or, as on a GPU, on the postprocessor's.
SLOW_CHECK = """
from tests.support.fake_models import NullModel, SlowCheckEngine

MODEL = NullModel("test/slow-check", SlowCheckEngine)
SlowCheckEngine.decodes_concurrently = {decodes_concurrently}
"""


def all_events(client: httpx.Client, path: str) -> str:
    """The status stream up to where the server ends."""
    lines: list[str] = []
    with (
        contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError),
        client.stream("GET", f"{path}/stream", params={"logs": "1", "previews": "1"}) as answer,
    ):
        for line in answer.iter_lines():
            lines += [line]
    return "\n".join(lines)


@pytest.mark.parametrize("decodes_concurrently", [False, True])
def test_nor_does_a_check_that_does_not_end(tmp_path: Path, gate: Gate, decodes_concurrently: bool) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "slow_check.py").write_text(SLOW_CHECK.format(decodes_concurrently=decodes_concurrently))
    data_dir, settings = tmp_path / "data", {"enforce_safety_checker": "true", "models_dir": str(tmp_path / "models")}
    request = {"prompt": str(gate.path), "num_inference_steps": 2, FIELD: False}
    with serving(data_dir, "test/slow-check=demo", step_deadline="1", **settings) as first, client_of(first) as client:
        path = submit(client, request, "test/slow-check")
        events = all_events(client, path)
        assert exit_code(first) == EXIT_STUCK
        assert "in is_unsafe" in first.output
    assert '"IN_PROGRESS"' in events
    assert not any(word in events for word in ("COMPLETED", "preview", "images"))
    assert not list((data_dir / "files").iterdir())
    assert rows(data_dir, STRIKES) == [("IN_PROGRESS", None, 1)]
    gate.let(1)
    with (
        serving(data_dir, "test/slow-check=demo", step_deadline="1", **settings) as second,
        client_of(second) as client,
    ):
        assert completed(client, path).get("error") is None
        output = client.get(path.removesuffix("/status")).json()
        assert output["has_nsfw_concepts"] == [True]
        assert [is_black(content) for content in pictures(client, output)] == [True]
        assert second.stop() == 0
