"""A page in a real browser: @fal-ai/client with a proxyUrl that leads here, from another origin."""

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

from tests.clients.test_node_clients import node as node
from tests.support.node import JS
from tests.support.server_process import Server

#: As Debian, Ubuntu and Google name it.
NAMES = ("chromium", "chromium-browser", "google-chrome")
INDEX = '<!doctype html><link rel="icon" href="data:,"><script type="module" src="page.js"></script>'
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a word."""

    def log_message(self, *_: Any) -> None:
        return


def installed(names: Sequence[str]) -> str:
    """A program's path, by one of its names, the package's first; skips without it, and fails in CI."""
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        missing = f"{names[0]} is missing: install it, such as by `apt-get install {names[0]}`"
        if os.environ.get("CI"):
            pytest.fail(f"{missing}; CI must not skip the tests of browsers")
        pytest.skip(missing)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    path = installed(NAMES)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(node: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page is: on a port of its own, so that this server is another origin to it."""
    folder = tmp_path_factory.mktemp("site")
    esbuild = shutil.which("esbuild", path=str(JS / "node_modules" / ".bin"))
    assert esbuild, "esbuild is missing: `make test` installs it"
    command = [esbuild, "page.mjs", "--bundle", "--format=esm", "--log-level=error", f"--outfile={folder / 'page.js'}"]
    subprocess.run(command, cwd=JS, check=True, timeout=60)
    (folder / "index.html").write_text(INDEX)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield f"http://localhost:{listener.server_port}/"
        listener.shutdown()
        thread.join()


@pytest.fixture
def page(browser: Browser, site: str) -> Iterator[Page]:
    """The page, once its script has run."""
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(site)
    page.wait_for_function("document.title === 'ready'")
    yield page
    page.close()


@pytest.fixture
def complaints(page: Page) -> list[str]:
    """What the browser complains of, such as CORS."""
    found: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        if message.type == "error":
            found.append(message.text)

    page.on("console", listen)
    return found


def painted(page: Page, server: Server, endpoint: str) -> Any:
    """What the page comes to."""
    return page.evaluate("([url, endpoint]) => paint(url, endpoint)", [f"{server.url}/api/fal/proxy", endpoint])


@pytest.mark.parametrize("endpoint", ["fal-ai/flux/dev", "test/null"])
def test_a_page_gets_its_pictures(page: Page, complaints: list[str], server: Server, endpoint: str) -> None:
    got = painted(page, server, endpoint)
    for way in ("subscribed", "followed", "ran"):
        assert got[way]["data"]["prompt"] == "a red apple"
        assert got[way]["requestId"]
    assert got["streamed"]["requestId"]
    assert got["streamed"]["output"]["seed"] == 7
    assert got["updates"][-1] == "COMPLETED"
    assert got["isShown"] is True
    # The refusal that the page asks for is the only thing the browser minds.
    assert [text for text in complaints if "422" not in text] == []


def test_a_page_may_upload_and_read(page: Page, server: Server) -> None:
    got = painted(page, server, "test/null")
    assert got["uploaded"].startswith(f"{server.url}/files/")
    assert got["found"] == "hello"


def test_a_page_is_told_why_it_is_refused(page: Page, server: Server) -> None:
    refused = painted(page, server, "test/null")["refused"]
    assert refused["status"] == 422
    assert refused["body"]["detail"][0]["loc"] == ["body", "prompt"]
    assert refused["requestId"]


def test_a_foreign_page_may_not(page: Page, server: Server) -> None:
    foreign = "http://page.example/"
    page.route(f"{foreign}**", lambda route: route.fulfill(content_type="text/html", body="<!doctype html>"))
    page.goto(foreign)
    program = "url => fetch(url, {method: 'POST', body: '{\"prompt\": \"x\"}'}).then(() => 'got in', () => 'kept out')"
    assert page.evaluate(program, f"{server.url}/test/null") == "kept out"
