"""--enforce-safety-checker: no spelling of a request gets an image past the checker."""

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
from tests.clients.test_realtime import receive
from tests.reliability.test_kill import client_of, rows, submit
from tests.support.server_process import TEST_MODELS, Gate, Server, serving, wait_until_completed
from tests.unit.worker.test_watchdog import STATES_AND_CRASHES, exit_code

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
ROUTES = ["run", "stream", "proxy", "openai", "queue", "realtime"]
#: Prompts for which the safety checker of test/unsafe flags every image, returns no verdict, or raises an error.
PROMPTS = ["x", "silent", "raises"]


@pytest.fixture(scope="module")
def enforced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("enforced"), TEST_MODELS, enforce_safety_checker="true") as server:
        yield server.ready()


def bodies() -> Iterator[str]:
    """Yield bodies as JSON written by hand, because a library writes neither duplicate nor odd names."""
    size = '"image_size": {"width": 64, "height": 64}, "num_inference_steps": 1'
    for name, value, prompt in itertools.product(NAMES, VALUES, PROMPTS):
        fields = f'"prompt": "{prompt}", {size}'
        yield f'{{{fields}, "{name}": {value}}}'
        yield f'{{"{name}": {value}, {fields}, "{FIELD}": true, "{name}": {value}}}'
        yield f'{{{fields}, "{name}": {value}, "sync_mode": true}}'


def variants(number: int) -> list[tuple[str, str, dict[str, str], dict[str, str]]]:
    """Return `number` random combinations of route, body, query and headers, the same ones in every run."""
    every = list(itertools.product(ROUTES, bodies(), QUERIES, HEADERS))
    return random.Random(5).sample(every, number)


def output_of(client: httpx.Client, route: str, body: str, query: dict[str, str], headers: dict[str, str]) -> Any:
    """Send a request on this route; return its final output or error."""
    if route == "realtime":
        return over_realtime(client, body, query, headers)
    content: dict[str, Any] = {"content": body, "headers": {"content-type": "application/json", **headers}}
    if route == "queue":
        submitted = client.post("/queue/test/unsafe", params=query, **content)
        if submitted.status_code != 200:
            return submitted.json()
        path = httpx.URL(submitted.json()["status_url"]).path
        with client.stream("GET", f"{path}/stream") as status:
            status.read()
        return client.get(path.removesuffix("/status")).json()
    if route == "stream":
        events: list[str] = []
        # The server cuts off a failed stream after its last event.
        with (
            client.stream("POST", "/test/unsafe/stream", params=query, **content) as answer,
            contextlib.suppress(httpx.RemoteProtocolError),
        ):
            for line in answer.iter_lines():
                events += [line[6:]] if line.startswith("data: ") else []
        return json.loads(events[-1]) if events else {}
    if route == "proxy":
        content["headers"]["x-fal-target-url"] = str(httpx.URL("https://fal.run/test/unsafe", params=query))
        return client.post("/api/fal/proxy", **content).json()
    if route == "openai":
        content["content"] = body[:1] + '"model": "test/unsafe", ' + body[1:]
        return client.post("/v1/images/generations", params=query, **content).json()
    return client.post("/test/unsafe", params=query, **content).json()


def over_realtime(client: httpx.Client, body: str | bytes, query: dict[str, str], headers: dict[str, str]) -> Any:
    """Send one input over a realtime session; return its answer."""
    url = client.base_url.join("/test/unsafe/realtime").copy_with(scheme="ws", params=query)
    with connect(str(url), additional_headers=headers, proxy=None, open_timeout=60, max_size=None) as socket:
        socket.send(body)
        return receive(socket)


def images_of(client: httpx.Client, output: Any) -> list[bytes]:
    """Return the content of every image of an output, from any route."""
    images = []
    for image in [*output.get("images", []), *output.get("data", [])]:
        if "b64_json" in image:
            images.append(base64.b64decode(image["b64_json"]))
        elif image["url"].startswith("data:"):
            images.append(base64.b64decode(image["url"].partition(",")[2]))
        else:
            images.append(client.get(httpx.URL(image["url"]).path).content)
    return images


def is_black(content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("L").getextrema()[1] == 0


def try_variants(server: Server, number: int) -> None:
    """Try `number` variants; each must end in black images that are flagged, or in an error."""
    num_images = Counter[str]()
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        for variant in variants(number):
            output = output_of(client, *variant)
            assert "preview" not in str(output)
            for content in images_of(client, output):
                num_images[variant[0]] += 1
                assert is_black(content), variant
            assert all(output.get("has_nsfw_concepts", [True])), variant
    # The test means little unless every route accepts enough of the variants.
    assert min(num_images[route] for route in ROUTES) > number / 100, num_images


def test_no_spelling_gets_past_the_checker(enforced: Server) -> None:
    try_variants(enforced, 1_000)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_none_of_many_more_spellings_gets_past_the_checker(enforced: Server) -> None:
    try_variants(enforced, 5_000)


@pytest.mark.parametrize("value", [False, 0, "false", None])
def test_no_msgpack_message_gets_past_the_checker(enforced: Server, value: object) -> None:
    body = {"prompt": "x", "image_size": {"width": 64, "height": 64}, FIELD: value, "sync_mode": True}
    with httpx.Client(base_url=enforced.url, timeout=60, trust_env=False) as client:
        output = over_realtime(client, msgpack.packb(body), {}, {})
        assert all(is_black(content) for content in images_of(client, output))
    assert "images" in output or output["type"] == "x-fal-error"
    assert all(output.get("has_nsfw_concepts", [True]))


#: The source of a model whose safety check runs on the worker's thread or, as on a GPU, on the postprocessor's.
SLOW_CHECK = """
from tests.support.fake_models import NullModel, SlowCheckEngine

MODEL = NullModel("test/slow-check", SlowCheckEngine)
SlowCheckEngine.decodes_concurrently = {decodes_concurrently}
"""


def all_events(client: httpx.Client, path: str) -> str:
    """Read the status stream until it ends, also if the server dies; return its text."""
    lines: list[str] = []
    with (
        contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError),
        client.stream("GET", f"{path}/stream", params={"logs": "1", "previews": "1"}) as answer,
    ):
        for line in answer.iter_lines():
            lines += [line]
    return "\n".join(lines)


@pytest.mark.parametrize("decodes_concurrently", [False, True])
def test_a_check_that_hangs_lets_no_image_pass(tmp_path: Path, gate: Gate, decodes_concurrently: bool) -> None:
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
    assert rows(data_dir, STATES_AND_CRASHES) == [("IN_PROGRESS", None, 1)]
    gate.release(1)
    with (
        serving(data_dir, "test/slow-check=demo", step_deadline="1", **settings) as second,
        client_of(second) as client,
    ):
        assert wait_until_completed(client, path).get("error") is None
        output = client.get(path.removesuffix("/status")).json()
        assert output["has_nsfw_concepts"] == [True]
        assert [is_black(content) for content in images_of(client, output)] == [True]
        assert second.stop() == 0
