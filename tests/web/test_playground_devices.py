"""The playground in Firefox, on a phone, in the dark; and what bars people from using it."""

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.clients.test_node_clients import node as node
from tests.support.node import JS
from tests.support.server_process import Server
from tests.web.test_browser_client import browser as browser
from tests.web.test_browser_client import installed
from tests.web.test_playground import choose, opened, run
from tests.web.test_playground import playing as playing

#: As Debian and others name it.
NAMES = ("firefox-esr", "firefox")
#: The page's ground in the dark, as style.css has it.
DARK = "rgb(20, 20, 25)"


def test_in_firefox(node: None, playing: Server) -> None:
    """Typed, run, seen, kept over a reload; in the dark, and on the width of a phone."""
    command = ["node", "firefox.mjs", installed(NAMES), playing.url, "test/null", "seen in Firefox"]
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR", "LANG")}
    done = subprocess.run(command, cwd=JS, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert (seen["size"], seen["kept"]) == ([1024, 768], "seen in Firefox")
    assert seen["state"].startswith("seed ")
    assert (seen["errors"], seen["foreign"]) == ([], [])
    assert seen["overflow"] <= 0
    assert seen["ground"] == DARK


def barriers(page: Page) -> list[str]:
    """What axe calls serious or critical: the rule, and where."""
    source = (JS / "node_modules" / "axe-core" / "axe.min.js").read_text()
    # By the debugger, because the page's own policy lets nothing in.
    page.evaluate(source + "\n;0")
    found: Any = page.evaluate("async () => (await axe.run()).violations")
    return [
        f"{rule['id']}: {node['target']}: {node['failureSummary']}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


LOOKS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "has_touch": True},
    "phone, dark": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "reduced_motion": "reduce"},
}


@pytest.fixture(params=LOOKS)
def page(request: pytest.FixtureRequest, browser: Browser, playing: Server) -> Iterator[Page]:
    yield from opened(browser, playing.url, **LOOKS[request.param])


def fits(page: Page) -> bool:
    """Whether nothing is wider than the window."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def test_nothing_bars_anybody_from_the_playground(node: None, page: Page) -> None:
    """At the start, with everything unfolded, with pictures and failures, in code, and when a key is asked for."""
    choose(page, "test/null")
    assert barriers(page) == []
    expect(run(page, "a picture").locator("figure img")).to_be_visible()
    choose(page, "test/lora")
    page.get_by_text("More settings").click()
    page.get_by_role("button", name="Add").click()
    page.get_by_label("Guidance scale", exact=True).fill("99")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("[aria-invalid=true]").first).to_be_visible()
    page.get_by_text("Request, answer, log").first.click()
    assert barriers(page) == []
    assert fits(page)
    page.get_by_role("tab", name="Code").click()
    assert barriers(page) == []
    assert fits(page)
    page.evaluate("document.getElementById('ask').showModal()")
    assert barriers(page) == []


def test_nothing_bars_anybody_from_the_operators_view(node: None, page: Page, playing: Server) -> None:
    httpx.post(f"{playing.url}/test/null", json={"prompt": "x"}, trust_env=False).raise_for_status()
    httpx.post(f"{playing.url}/test/raises", json={"prompt": "x"}, trust_env=False)
    page.goto(f"{playing.url}/status")
    expect(page.locator("#failures")).to_contain_text("test/raises")
    assert barriers(page) == []
    assert fits(page)


def test_with_the_keyboard_alone(page: Page) -> None:
    """From the top of the page to a picture, and to the code, by Tab, arrows and Enter."""
    choose(page, "test/null")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "field-prompt":
            break
    page.keyboard.type("by keyboard")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#runs > li").first.locator("figure img")).to_be_visible()
    page.get_by_role("tab", name="Pictures").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Code")).to_be_focused()
    expect(page.locator("pre[data-language=curl]")).to_contain_text("by keyboard")
