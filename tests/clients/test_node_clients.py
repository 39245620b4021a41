"""The unmodified Node SDKs over a real socket: the endpoint page's samples, and every call there is."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.node import JS, MARK, PAGE_ID, Client, clients, page
from tests.support.server_process import TEST_MODELS, Gate, Server, completed, serving

NAMES = ["serverless-client", "client, proxyUrl", "client, requestMiddleware"]
MODES = ["polling", "streaming"]
OUTPUT = {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
STATUSES = {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}
STEPS = ["step 1/3", "step 2/3", "step 3/3"]
JPEG, PNG = "ffd8ff", "89504e47"
CANCELLED = {"detail": "Request cancelled by the client.", "error_type": "client_cancelled"}


@pytest.fixture(scope="session")
def node() -> None:
    """Skips without Node and the SDKs, except in CI, where it fails."""
    places = {"node": shutil.which("node"), "tests/support/js/node_modules": (JS / "node_modules" / "@fal-ai").is_dir()}
    missing = " and ".join(name for name, is_there in places.items() if not is_there)
    if missing and os.environ.get("CI"):
        pytest.fail(f"{missing} missing: CI must not skip the tests of the Node SDKs")
    if missing:
        pytest.skip(f"{missing} missing: install Node 20 and run `make test`, which installs the SDKs")


@pytest.fixture(scope="session")
def every_client(node: None, server: Server) -> dict[str, Client]:
    """All SDKs in all ways of pointing them at the server."""
    return clients(server)


@pytest.fixture(params=NAMES)
def sdk(every_client: dict[str, Client], request: pytest.FixtureRequest) -> Client:
    """One of them."""
    return every_client[request.param]


@pytest.fixture
def narrow_sdk(sdk: Client, server: Server, narrow: Server) -> Client:
    """The same, pointed at a server that holds all others back while one request runs."""
    return sdk.at(server.url, narrow.url)


@pytest.fixture(scope="session")
def painted(every_client: dict[str, Client]) -> dict[str, Any]:
    """What paint.mjs says with each SDK."""
    return {name: client.run("paint.mjs") for name, client in every_client.items()}


def test_sdks_are_those_that_package_json_names(node: None) -> None:
    wanted = json.loads((JS / "package.json").read_text())["dependencies"]
    found = {name: json.loads((JS / "node_modules" / name / "package.json").read_text())["version"] for name in wanted}
    assert found == wanted


@pytest.mark.parametrize("name", ["subscribe", "config", "submit", "status", "result", "upload"])
def test_only_marked_lines_are_added_to_the_page(every_client: dict[str, Client], name: str) -> None:
    program = every_client["serverless-client"].program(name, "fal", PAGE_ID)
    assert [line for line in program.splitlines() if not line.endswith(MARK)] == page(name).splitlines()
    assert program.count(MARK) == 2


def test_page_subscribe(sdk: Client) -> None:
    output = sdk.output(sdk.run_page("subscribe", "result"))
    assert output.keys() == OUTPUT
    assert output["prompt"] in page("subscribe").replace('\\"', '"')
    assert [(image["width"], image["height"]) for image in output["images"]] == [(1024, 768)]


def test_page_submit_status_result(sdk: Client, client: httpx.Client) -> None:
    request_id = sdk.run_page("submit", "request_id")
    completed(client, f"/queue/fal-ai/flux/requests/{request_id}/status")
    status = sdk.run_page("status", "status", request_id)
    assert (status["status"], status["request_id"]) == ("COMPLETED", request_id)
    assert [log["message"] for log in status["logs"]] == [f"step {step}/28" for step in range(1, 29)]
    result = sdk.run_page("result", "result", request_id)
    assert sdk.output(result).keys() == OUTPUT
    assert sdk.is_raw or result["requestId"] == request_id


def test_page_config(every_client: dict[str, Client], server: Server, tmp_path: Path) -> None:
    submit = 'await fal.queue.submit("test/null", { input: { prompt: "x" } })'
    with serving(tmp_path, TEST_MODELS, keys="YOUR_FAL_KEY") as locked:
        for open_client in every_client.values():
            # With a key in its pointing and its environment that this server refuses.
            client = open_client.at(server.url, locked.url)
            assert client.run("unauthorized.mjs")["status"] == 401
            assert client.run_page("config", submit)["status"] == "IN_QUEUE"


def test_page_upload(sdk: Client, server: Server, client: httpx.Client) -> None:
    url = sdk.run_page("upload", "url")
    assert url.startswith(f"{server.url}/files/")
    answer = client.get(url)
    assert (answer.content, answer.headers["content-type"]) == (b"Hello, World!", "text/plain; charset=utf-8")
    assert answer.headers["content-disposition"] == 'attachment; filename="hello.txt"'


def test_queue(sdk: Client, gate: Gate) -> None:
    said = sdk.run("queue.mjs", str(gate.path))
    submitted, request_id = said["submitted"], said["submitted"]["request_id"]
    assert (submitted["status"], submitted["queue_position"]) == ("IN_QUEUE", 0)
    assert (said["running"]["request_id"], said["running"]["logs"]) == (request_id, None)
    assert (said["early"]["status"], said["early"]["body"]["detail"]) == (400, "Request is still in progress")
    assert said["quiet"]["logs"] is None
    assert [log["message"] for log in said["completed"]["logs"]] == STEPS
    assert said["completed"]["metrics"]["inference_time"] >= 0
    assert sdk.output(said["result"]).keys() == OUTPUT
    assert sdk.is_raw or said["result"]["requestId"] == request_id


def test_stream_status_tells_each_log_line_once(sdk: Client, gate: Gate) -> None:
    said = sdk.run("queue.mjs", str(gate.path))
    events = said["events"]
    logs = [log for event in events for log in event["logs"]]
    assert [log["message"] for log in logs] == STEPS
    assert all(log.keys() >= {"message", "level", "source", "timestamp"} for log in logs)
    assert [event["status"] for event in events[:-1]] == ["IN_PROGRESS"] * (len(events) - 1)
    assert len(events) > 3
    assert said["last"] == events[-1]
    assert events[-1]["status"] == "COMPLETED"


@pytest.mark.parametrize("mode", MODES)
def test_subscribe_with_logs(sdk: Client, gate: Gate, mode: str) -> None:
    said = sdk.run("subscribe.mjs", str(gate.path), mode)
    updates = said["updates"]
    assert updates[-1] == {"status": "COMPLETED", "messages": STEPS}
    assert [len(update["messages"]) for update in updates] == sorted(len(update["messages"]) for update in updates)
    assert all(update["messages"] == STEPS[: len(update["messages"])] for update in updates)
    assert {"IN_PROGRESS", "COMPLETED"} <= {update["status"] for update in updates} <= STATUSES
    assert sdk.output(said["result"]).keys() == OUTPUT
    assert sdk.is_raw or said["result"]["requestId"] == said["enqueued"]


@pytest.mark.parametrize("mode", MODES)
def test_timeout_of_subscribe_cancels_on_the_server(narrow_sdk: Client, gate: Gate, mode: str) -> None:
    said = narrow_sdk.run("timeout.mjs", str(gate.path), mode)
    message = "Client timed out waiting for the request to complete after 100ms"
    assert (said["timedOut"]["status"], said["timedOut"]["error_type"]) == ("COMPLETED", "client_cancelled")
    assert message in [said["failure"]["message"], *said["thrown"]]


def test_cancel(narrow_sdk: Client, gate: Gate) -> None:
    said = narrow_sdk.run("cancel.mjs", str(gate.path))
    for status, result in (("waiting", "waitingResult"), ("running", "runningResult")):
        assert (said[status]["status"], said[status]["error_type"]) == ("COMPLETED", "client_cancelled")
        failure = said[result]
        assert (failure["isApiError"], failure["isValidationError"], failure["status"]) == (True, False, 499)
        assert failure["body"].items() >= CANCELLED.items()
        assert narrow_sdk.is_raw or failure["requestId"] == said[status]["request_id"]
    assert (said["late"]["status"], said["late"]["body"]["status"]) == (400, "ALREADY_COMPLETED")
    assert (said["unknown"]["status"], said["unknown"]["body"]["status"]) == (404, "NOT_FOUND")


def test_requests_move_up_when_one_before_them_is_cancelled(narrow_sdk: Client, gate: Gate) -> None:
    said = narrow_sdk.run("cancel.mjs", str(gate.path))
    first, second = said["updates"][:2]
    assert (first["status"], first["queue_position"]) == ("IN_QUEUE", 1)
    assert (second["status"], second["queue_position"]) == ("IN_QUEUE", 0)
    assert said["behind"] == said["updates"][-1]
    assert said["behind"]["status"] == "COMPLETED"
    assert "error" not in said["behind"]


def test_stream_tells_progress_then_the_output(sdk: Client, gate: Gate) -> None:
    said = sdk.run("stream.mjs", str(gate.path))
    *progress, output = said["events"]
    assert progress[0]["preview"].startswith("data:image/jpeg;base64,")
    told = {"type": "progress", "step": 1, "num_inference_steps": 3, "preview": progress[0]["preview"]}
    assert progress[0] == told
    assert [event["step"] for event in progress] in ([1, 2], [1, 2, 3])
    assert output.keys() == OUTPUT
    assert said["last"] == output
    # The iterator of the older SDK drops what it still holds when the stream ends.
    assert sdk.is_raw or said["iterated"] == said["events"]
    assert sdk.is_raw or said["requestId"]


@pytest.fixture
def refused(sdk: Client) -> Any:
    """What invalid.mjs says."""
    return sdk.run("invalid.mjs")


def test_invalid_input(refused: Any) -> None:
    for failure in refused["invalid"].values():
        assert (failure["name"], failure["isValidationError"], failure["status"]) == ("ValidationError", True, 422)
        assert failure["fieldErrors"] == failure["body"]["detail"]
        fields = {".".join(error["loc"]): error["msg"] for error in failure["fieldErrors"]}
        assert fields["body.num_inference_steps"] == "Input should be less than or equal to 50"
        assert fields["body.image_size"].startswith("Input should be 'square_hd', 'square'")
        for field, reason in fields.items():
            assert f"{field}: {reason}" in failure["message"]


def test_missing_prompt(refused: Any) -> None:
    (error,) = refused["missing"]["fieldErrors"]
    assert (error["loc"], error["type"]) == (["body", "prompt"], "missing")


def test_failure_and_not_found(refused: Any) -> None:
    failed = refused["failed"]
    assert (failed["name"], failed["status"], failed["isValidationError"]) == ("ApiError", 500, False)
    assert failed["body"]["detail"] == failed["message"] == "This cannot be painted."
    # 200 and a progress event had been said already: only the broken connection tells of the failure.
    assert refused["failedStream"]["name"] == "ApiError"
    assert refused["noSuchRequest"]["status"] == refused["noSuchEndpoint"]["status"] == 404
    assert refused["noSuchRequest"]["body"]["detail"] == refused["noSuchRequest"]["message"] == "Request not found"


def test_same_seed_gives_the_same_bytes_by_every_sdk_and_way(painted: dict[str, Any]) -> None:
    ways = ("run", "polling", "streaming", "stream", "syncMode")
    same = {said["pictures"][way]["sha256"] for said in painted.values() for way in ways}
    other = {said["pictures"]["otherSeed"]["sha256"] for said in painted.values()}
    assert len(same) == len(other) == 1
    assert same != other


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_found_at_their_urls(painted: dict[str, Any], server: Server, name: str) -> None:
    pictures = painted[name]["pictures"]
    for form, picture in pictures.items():
        type_, magic = ("image/png", PNG) if form == "png" else ("image/jpeg", JPEG)
        assert (picture["status"], picture["type"]) == (200, type_)
        assert picture["magic"].startswith(magic)
        assert picture["url"].startswith("data:image/jpeg;base64," if form == "syncMode" else f"{server.url}/files/")


@pytest.mark.parametrize("name", NAMES)
def test_results_have_the_fields_of_the_page(
    painted: dict[str, Any], every_client: dict[str, Client], name: str
) -> None:
    said, sdk = painted[name], every_client[name]
    for result in said["results"].values():
        output = sdk.output(result)
        assert output.keys() == OUTPUT
        assert [image.keys() for image in output["images"]] == [{"url", "width", "height", "content_type"}]
        assert (output["prompt"], output["has_nsfw_concepts"]) == ("an apple", [False])
        assert sdk.is_raw or result["requestId"]
    for way, request_id in said["enqueued"].items():
        assert sdk.is_raw or said["results"][way]["requestId"] == request_id
    assert [event["step"] for event in said["events"][:-1]] in ([], [1], [2], [1, 2])
    assert said["last"] == said["events"][-1]


@pytest.fixture(scope="session")
def uploaded(every_client: dict[str, Client]) -> dict[str, Any]:
    """What upload.mjs says with each SDK."""
    return {name: client.run("upload.mjs") for name, client in every_client.items()}


#: Content type and attachment name of each file in upload.mjs.
FILES = {
    "named": ("text/plain; charset=utf-8", "hello.txt"),
    "unnamed": ("image/png", None),
    "untyped": ("application/octet-stream", ".octet"),
    "page": ("text/html; charset=utf-8", "page.html"),
    "odd": ("text/plain;charset=utf-8", "M%C3%A4rz%20%22%F0%9F%8D%8E%22.txt"),
    "empty": ("text/plain; charset=utf-8", "empty.txt"),
}


@pytest.mark.parametrize("name", NAMES)
def test_uploads_are_found_at_their_urls(uploaded: dict[str, Any], server: Server, name: str) -> None:
    uploads = uploaded[name]["uploads"]
    assert uploads.keys() == FILES.keys()
    for kind, (type_, file_name) in FILES.items():
        found = uploads[kind]
        text = {"page": "<script>alert(1)</script>", "empty": ""}.get(kind, "Hello, World!")
        assert (found["status"], found["type"], found["text"]) == (200, type_, text)
        assert found["url"].startswith(f"{server.url}/files/")
        if file_name is None:
            assert found["disposition"] is None
        else:
            assert found["disposition"].startswith("attachment; filename")
            assert found["disposition"].rstrip('"').endswith(file_name)


@pytest.mark.parametrize("name", NAMES)
def test_blobs_inside_the_input_are_uploaded(uploaded: dict[str, Any], server: Server, name: str) -> None:
    inputs = uploaded[name]["inputs"]
    assert inputs.keys() == {"run", "subscribe", "submit", "stream"}
    for found in inputs.values():
        assert found["url"].startswith(f"{server.url}/files/")
        assert (found["status"], found["text"]) == (200, "Hello, World!")
    assert len({found["url"] for found in inputs.values()}) == 4


def test_a_large_file_in_parts(every_client: dict[str, Client]) -> None:
    said = every_client["client, proxyUrl"].run("upload_large.mjs")
    assert (said["found"]["status"], said["found"]["type"]) == (200, "image/png")
    assert said["found"]["sha256"] == said["sent"]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose one key is what the scripts have."""
    with serving(tmp_path_factory.mktemp("locked"), TEST_MODELS, keys="local") as running:
        yield running.ready()


@pytest.mark.parametrize("name", ["client, proxyUrl", "client, requestMiddleware"])
def test_private_files_and_pictures(every_client: dict[str, Client], server: Server, locked: Server, name: str) -> None:
    found = every_client[name].at(server.url, locked.url).run("upload_private.mjs")
    assert found["open"] == {"stranger": 200, "owner": 200}
    assert found["upload"] == found["picture"] == {"stranger": 404, "owner": 200}
