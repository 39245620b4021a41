"""@fal-ai/client in a real browser: a page of another origin whose proxyUrl is this server."""

import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.support.node import JS
from tests.support.server_process import Server

#: The names of Chromium's executable: Debian's, Ubuntu's and Google's.
NAMES = ("chromium", "chromium-browser", "google-chrome")
INDEX = '<!doctype html><link rel="icon" href="data:,"><script type="module" src="page.js"></script>'
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """A handler that serves a directory without logging."""

    def log_message(self, *_: Any) -> None:
        return


def find_executable(names: Sequence[str]) -> str:
    """Return the path of the first of `names` that is installed; the first name is also that of the package.

    If the program is missing, skip the test, or fail it in CI.
    """
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        missing = f"{names[0]} is missing: install it, for example with `apt-get install {names[0]}`"
        if os.environ.get("CI"):
            pytest.fail(f"{missing}; CI must not skip the browser tests")
        pytest.skip(missing)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Launch headless Chromium."""
    path = find_executable(NAMES)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(node: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the page on a different port than the server, so that the server is another origin."""
    directory = tmp_path_factory.mktemp("site")
    esbuild = shutil.which("esbuild", path=str(JS / "node_modules" / ".bin"))
    assert esbuild, "esbuild is missing: `make test` installs it"
    command = [
        esbuild,
        "page.mjs",
        "--bundle",
        "--format=esm",
        "--log-level=error",
        f"--outfile={directory / 'page.js'}",
    ]
    subprocess.run(command, cwd=JS, check=True, timeout=60)
    (directory / "index.html").write_text(INDEX)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(directory))) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield f"http://localhost:{listener.server_port}/"
        listener.shutdown()
        thread.join()


@pytest.fixture
def page(browser: Browser, site: str) -> Iterator[Page]:
    """Open the page and wait until its script has run."""
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(site)
    page.wait_for_function("document.title === 'ready'")
    yield page
    page.close()


@pytest.fixture
def console_errors(page: Page) -> list[str]:
    """Collect the browser's console errors, such as those of CORS."""
    errors: list[str] = []

    def collect(message: ConsoleMessage) -> None:
        if message.type == "error":
            errors.append(message.text)

    page.on("console", collect)
    return errors


def run_page(page: Page, server: Server, endpoint: str) -> Any:
    """Let the page use every method of the client; return the page's report."""
    return page.evaluate("([url, endpoint]) => paint(url, endpoint)", [f"{server.url}/api/fal/proxy", endpoint])


@pytest.mark.parametrize("endpoint", ["fal-ai/flux/dev", "test/null"])
def test_page_generates_images(page: Page, console_errors: list[str], server: Server, endpoint: str) -> None:
    report = run_page(page, server, endpoint)
    for method in ("subscribed", "followed", "ran"):
        assert report[method]["data"]["prompt"] == "a red apple"
        assert report[method]["requestId"]
    assert report["streamed"]["requestId"]
    assert report["streamed"]["output"]["seed"] == 7
    assert report["updates"][-1] == "COMPLETED"
    assert report["isShown"] is True
    # The browser reports only the 422 that the page provokes.
    assert [text for text in console_errors if "422" not in text] == []


def test_page_uploads_and_reads_a_file(page: Page, server: Server) -> None:
    report = run_page(page, server, "test/null")
    assert report["uploaded"].startswith(f"{server.url}/files/")
    assert report["found"] == "hello"


def test_page_reads_a_validation_error(page: Page, server: Server) -> None:
    refused = run_page(page, server, "test/null")["refused"]
    assert refused["status"] == 422
    assert refused["body"]["detail"][0]["loc"] == ["body", "prompt"]
    assert refused["requestId"]


def test_page_of_a_foreign_origin_is_blocked(page: Page, server: Server) -> None:
    foreign = "http://page.example/"
    page.route(f"{foreign}**", lambda route: route.fulfill(content_type="text/html", body="<!doctype html>"))
    page.goto(foreign)
    script = "url => fetch(url, {method: 'POST', body: '{\"prompt\": \"x\"}'}).then(() => 'got in', () => 'kept out')"
    assert page.evaluate(script, f"{server.url}/test/null") == "kept out"
