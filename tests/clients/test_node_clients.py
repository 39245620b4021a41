"""Tests of the unmodified Node SDKs over a real socket: the samples of fal's endpoint page, and every call."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.node import JS, MARK, PAGE_ID, Client, clients, page
from tests.support.server_process import ROOT, TEST_MODELS, Gate, Server, serving, wait_until_completed

NAMES = ["serverless-client", "client, proxyUrl", "client, requestMiddleware"]
MODES = ["polling", "streaming"]
OUTPUT = {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
STATUSES = {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}
STEP_LOGS = ["step 1/3", "step 2/3", "step 3/3"]
JPEG, PNG = "ffd8ff", "89504e47"
CANCELLED = {"detail": "Request cancelled by the client.", "error_type": "client_cancelled"}


@pytest.fixture(scope="session")
def sdks(node: None, server: Server) -> dict[str, Client]:
    """Return every SDK with every way of pointing it at the server."""
    return clients(server)


@pytest.fixture(params=NAMES)
def sdk(sdks: dict[str, Client], request: pytest.FixtureRequest) -> Client:
    """Return one of the configured SDKs."""
    return sdks[request.param]


@pytest.fixture
def narrow_sdk(sdk: Client, server: Server, constrained_server: Server) -> Client:
    """Return the SDK pointed at a server that runs one request at a time."""
    return sdk.at(server.url, constrained_server.url)


@pytest.fixture(scope="session")
def generated(sdks: dict[str, Client]) -> dict[str, Any]:
    """Run generate.mjs with each SDK and return the outputs by the name of the SDK."""
    return {name: client.run("generate.mjs") for name, client in sdks.items()}


def test_installed_sdks_match_package_json(node: None) -> None:
    declared = json.loads((JS / "package.json").read_text())["dependencies"]
    installed = {
        name: json.loads((JS / "node_modules" / name / "package.json").read_text())["version"] for name in declared
    }
    assert installed == declared


@pytest.mark.parametrize("name", ["subscribe", "config", "submit", "status", "result", "upload"])
def test_only_marked_lines_are_added_to_the_page(sdks: dict[str, Client], name: str) -> None:
    program = sdks["serverless-client"].program(name, "fal", PAGE_ID)
    assert [line for line in program.splitlines() if not line.endswith(MARK)] == page(name).splitlines()
    assert program.count(MARK) == 2


def test_page_subscribe(sdk: Client) -> None:
    output = sdk.output(sdk.run_page("subscribe", "result"))
    assert output.keys() == OUTPUT
    assert output["prompt"] in page("subscribe").replace('\\"', '"')
    assert [(image["width"], image["height"]) for image in output["images"]] == [(1024, 768)]


# The page's program generates an image of the default size, which takes a while on a CPU.
@pytest.mark.parametrize(
    "sdk", [NAMES[0], *(pytest.param(name, marks=pytest.mark.thorough) for name in NAMES[1:])], indirect=True
)
def test_page_submit_status_result(sdk: Client, client: httpx.Client) -> None:
    request_id = sdk.run_page("submit", "request_id")
    wait_until_completed(client, f"/queue/fal-ai/flux/requests/{request_id}/status")
    status = sdk.run_page("status", "status", request_id)
    assert (status["status"], status["request_id"]) == ("COMPLETED", request_id)
    assert [log["message"] for log in status["logs"]] == [f"step {step}/28" for step in range(1, 29)]
    result = sdk.run_page("result", "result", request_id)
    assert sdk.output(result).keys() == OUTPUT
    assert sdk.is_raw or result["requestId"] == request_id


def test_page_config(sdks: dict[str, Client], server: Server, tmp_path: Path) -> None:
    submit = 'await fal.queue.submit("test/null", { input: { prompt: "x" } })'
    with serving(tmp_path, TEST_MODELS, keys="YOUR_FAL_KEY") as keyed_server:
        for open_client in sdks.values():
            # The SDK's configuration and environment carry a key that this server refuses.
            client = open_client.at(server.url, keyed_server.url)
            assert client.run("unauthorized.mjs")["status"] == 401
            assert client.run_page("config", submit)["status"] == "IN_QUEUE"


def test_page_upload(sdk: Client, server: Server, client: httpx.Client) -> None:
    url = sdk.run_page("upload", "url")
    assert url.startswith(f"{server.url}/files/")
    answer = client.get(url)
    assert (answer.content, answer.headers["content-type"]) == (b"Hello, World!", "text/plain; charset=utf-8")
    assert answer.headers["content-disposition"] == 'attachment; filename="hello.txt"'


def test_queue(sdk: Client, gate: Gate) -> None:
    output = sdk.run("queue.mjs", str(gate.path))
    submitted, request_id = output["submitted"], output["submitted"]["request_id"]
    assert (submitted["status"], submitted["queue_position"]) == ("IN_QUEUE", 0)
    assert (output["running"]["request_id"], output["running"]["logs"]) == (request_id, None)
    assert (output["early"]["status"], output["early"]["body"]["detail"]) == (400, "Request is still in progress")
    assert output["quiet"]["logs"] is None
    assert [log["message"] for log in output["completed"]["logs"]] == STEP_LOGS
    assert output["completed"]["metrics"]["inference_time"] >= 0
    assert sdk.output(output["result"]).keys() == OUTPUT
    assert sdk.is_raw or output["result"]["requestId"] == request_id


def test_stream_status_sends_each_log_line_once(sdk: Client, gate: Gate) -> None:
    output = sdk.run("queue.mjs", str(gate.path))
    events = output["events"]
    logs = [log for event in events for log in event["logs"]]
    assert [log["message"] for log in logs] == STEP_LOGS
    assert all(log.keys() >= {"message", "level", "source", "timestamp"} for log in logs)
    assert [event["status"] for event in events[:-1]] == ["IN_PROGRESS"] * (len(events) - 1)
    assert len(events) > 3
    assert output["last"] == events[-1]
    assert events[-1]["status"] == "COMPLETED"


@pytest.mark.parametrize("mode", MODES)
def test_subscribe_with_logs(sdk: Client, gate: Gate, mode: str) -> None:
    output = sdk.run("subscribe.mjs", str(gate.path), mode)
    updates = output["updates"]
    assert updates[-1] == {"status": "COMPLETED", "messages": STEP_LOGS}
    assert [len(update["messages"]) for update in updates] == sorted(len(update["messages"]) for update in updates)
    assert all(update["messages"] == STEP_LOGS[: len(update["messages"])] for update in updates)
    assert {"IN_PROGRESS", "COMPLETED"} <= {update["status"] for update in updates} <= STATUSES
    assert sdk.output(output["result"]).keys() == OUTPUT
    assert sdk.is_raw or output["result"]["requestId"] == output["enqueued"]


@pytest.mark.parametrize("mode", MODES)
def test_subscribe_timeout_cancels_the_request(narrow_sdk: Client, gate: Gate, mode: str) -> None:
    output = narrow_sdk.run("timeout.mjs", str(gate.path), mode)
    message = "Client timed out waiting for the request to complete after 100ms"
    assert (output["timedOut"]["status"], output["timedOut"]["error_type"]) == ("COMPLETED", "client_cancelled")
    assert message in [output["failure"]["message"], *output["thrown"]]


def test_cancel(narrow_sdk: Client, gate: Gate) -> None:
    output = narrow_sdk.run("cancel.mjs", str(gate.path))
    for status, result in (("waiting", "waitingResult"), ("running", "runningResult")):
        assert (output[status]["status"], output[status]["error_type"]) == ("COMPLETED", "client_cancelled")
        failure = output[result]
        assert (failure["isApiError"], failure["isValidationError"], failure["status"]) == (True, False, 499)
        assert failure["body"].items() >= CANCELLED.items()
        assert narrow_sdk.is_raw or failure["requestId"] == output[status]["request_id"]
    assert (output["late"]["status"], output["late"]["body"]["status"]) == (400, "ALREADY_COMPLETED")
    assert (output["unknown"]["status"], output["unknown"]["body"]["status"]) == (404, "NOT_FOUND")


def test_queue_position_drops_when_an_earlier_request_is_cancelled(narrow_sdk: Client, gate: Gate) -> None:
    output = narrow_sdk.run("cancel.mjs", str(gate.path))
    first, second = output["updates"][:2]
    assert (first["status"], first["queue_position"]) == ("IN_QUEUE", 1)
    assert (second["status"], second["queue_position"]) == ("IN_QUEUE", 0)
    assert output["behind"] == output["updates"][-1]
    assert output["behind"]["status"] == "COMPLETED"
    assert "error" not in output["behind"]


def test_stream_sends_progress_then_the_output(sdk: Client, gate: Gate) -> None:
    program_output = sdk.run("stream.mjs", str(gate.path))
    *progress, output = program_output["events"]
    assert progress[0]["preview"].startswith("data:image/jpeg;base64,")
    expected = {"type": "progress", "step": 1, "num_inference_steps": 3, "preview": progress[0]["preview"]}
    assert progress[0] == expected
    assert [event["step"] for event in progress] in ([1, 2], [1, 2, 3])
    assert output.keys() == OUTPUT
    assert program_output["last"] == output
    # The iterator of the older SDK drops buffered events when the stream ends.
    assert sdk.is_raw or program_output["iterated"] == program_output["events"]
    assert sdk.is_raw or program_output["requestId"]


@pytest.fixture
def failures(sdk: Client) -> Any:
    """Run invalid.mjs and return its output."""
    return sdk.run("invalid.mjs")


def test_invalid_input(failures: Any) -> None:
    for failure in failures["invalid"].values():
        assert (failure["name"], failure["isValidationError"], failure["status"]) == ("ValidationError", True, 422)
        assert failure["fieldErrors"] == failure["body"]["detail"]
        fields = {".".join(error["loc"]): error["msg"] for error in failure["fieldErrors"]}
        assert fields["body.num_inference_steps"] == "Input should be less than or equal to 50"
        assert fields["body.image_size"].startswith("Input should be 'square_hd', 'square'")
        for field, reason in fields.items():
            assert f"{field}: {reason}" in failure["message"]


def test_missing_prompt(failures: Any) -> None:
    (error,) = failures["missing"]["fieldErrors"]
    assert (error["loc"], error["type"]) == (["body", "prompt"], "missing")


def test_failure_and_not_found(failures: Any) -> None:
    failed = failures["failed"]
    assert (failed["name"], failed["status"], failed["isValidationError"]) == ("ApiError", 500, False)
    assert failed["body"]["detail"] == failed["message"] == "This cannot be painted."
    # The server has already sent 200 and a progress event. Only the broken connection reports the failure.
    assert failures["failedStream"]["name"] == "ApiError"
    assert failures["noSuchRequest"]["status"] == failures["noSuchEndpoint"]["status"] == 404
    assert failures["noSuchRequest"]["body"]["detail"] == failures["noSuchRequest"]["message"] == "Request not found"


def test_same_seed_gives_the_same_bytes_with_every_sdk_and_call(generated: dict[str, Any]) -> None:
    calls = ("run", "polling", "streaming", "stream", "syncMode")
    same = {output["pictures"][call]["sha256"] for output in generated.values() for call in calls}
    other = {output["pictures"]["otherSeed"]["sha256"] for output in generated.values()}
    assert len(same) == len(other) == 1
    assert same != other


@pytest.mark.parametrize("name", NAMES)
def test_images_are_served_at_their_urls(generated: dict[str, Any], server: Server, name: str) -> None:
    images = generated[name]["pictures"]
    for form, image in images.items():
        type_, magic = ("image/png", PNG) if form == "png" else ("image/jpeg", JPEG)
        assert (image["status"], image["type"]) == (200, type_)
        assert image["magic"].startswith(magic)
        assert image["url"].startswith("data:image/jpeg;base64," if form == "syncMode" else f"{server.url}/files/")


@pytest.mark.parametrize("name", NAMES)
def test_results_have_the_documented_fields(generated: dict[str, Any], sdks: dict[str, Client], name: str) -> None:
    program_output, sdk = generated[name], sdks[name]
    for result in program_output["results"].values():
        output = sdk.output(result)
        assert output.keys() == OUTPUT
        assert [image.keys() for image in output["images"]] == [{"url", "width", "height", "content_type"}]
        assert (output["prompt"], output["has_nsfw_concepts"]) == ("an apple", [False])
        assert sdk.is_raw or result["requestId"]
    for call, request_id in program_output["enqueued"].items():
        assert sdk.is_raw or program_output["results"][call]["requestId"] == request_id
    assert [event["step"] for event in program_output["events"][:-1]] in ([], [1], [2], [1, 2])
    assert program_output["last"] == program_output["events"][-1]


@pytest.fixture(scope="session")
def upload_results(sdks: dict[str, Client]) -> dict[str, Any]:
    """Run upload.mjs with each SDK and return the outputs by the name of the SDK."""
    return {name: client.run("upload.mjs") for name, client in sdks.items()}


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
def test_uploads_are_served_at_their_urls(upload_results: dict[str, Any], server: Server, name: str) -> None:
    uploads = upload_results[name]["uploads"]
    assert uploads.keys() == FILES.keys()
    for kind, (type_, file_name) in FILES.items():
        upload = uploads[kind]
        text = {"page": "<script>alert(1)</script>", "empty": ""}.get(kind, "Hello, World!")
        assert (upload["status"], upload["type"], upload["text"]) == (200, type_, text)
        assert upload["url"].startswith(f"{server.url}/files/")
        if file_name is None:
            assert upload["disposition"] is None
        else:
            assert upload["disposition"].startswith("attachment; filename")
            assert upload["disposition"].rstrip('"').endswith(file_name)


@pytest.mark.parametrize("name", NAMES)
def test_blobs_inside_the_input_are_uploaded(upload_results: dict[str, Any], server: Server, name: str) -> None:
    inputs = upload_results[name]["inputs"]
    assert inputs.keys() == {"run", "subscribe", "submit", "stream"}
    for upload in inputs.values():
        assert upload["url"].startswith(f"{server.url}/files/")
        assert (upload["status"], upload["text"]) == (200, "Hello, World!")
    assert len({upload["url"] for upload in inputs.values()}) == 4


def test_multipart_upload_of_a_large_file(sdks: dict[str, Client]) -> None:
    output = sdks["client, proxyUrl"].run("upload_large.mjs")
    assert (output["found"]["status"], output["found"]["type"]) == (200, "image/png")
    assert output["found"]["sha256"] == output["sent"]


@pytest.fixture(scope="module")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server whose only key is the one that the scripts use."""
    with serving(tmp_path_factory.mktemp("locked"), TEST_MODELS, keys="local") as running:
        yield running.ready()


@pytest.mark.parametrize("name", ["client, proxyUrl", "client, requestMiddleware"])
def test_private_files_and_images(sdks: dict[str, Client], server: Server, keyed_server: Server, name: str) -> None:
    statuses = sdks[name].at(server.url, keyed_server.url).run("upload_private.mjs")
    assert statuses["open"] == {"stranger": 200, "owner": 200}
    assert statuses["upload"] == statuses["image"] == {"stranger": 404, "owner": 200}


def test_the_program_of_the_quickstart(node: None, server: Server) -> None:
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    program = text.partition("```js\n")[2].partition("```")[0].replace("http://127.0.0.1:8000", server.url)
    # The variables are those of a new user's shell: no key and no proxy.
    process = subprocess.run(
        ["node", "--input-type=module"],
        cwd=JS,
        env={"PATH": os.environ["PATH"]},
        input=program.replace("fal-ai/flux/dev", "test/null"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.stdout.startswith(f"{server.url}/files/"), process.stderr
