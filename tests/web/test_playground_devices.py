"""The playground in Firefox, on a phone and in the dark theme, and the accessibility of its pages."""

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.node import JS
from tests.support.server_process import Gate, Server
from tests.web.test_browser_client import browser as browser
from tests.web.test_browser_client import find_executable
from tests.web.test_playground import choose, open_page, run
from tests.web.test_playground import playing as playing

#: The names of Firefox's executable: Debian's, then the usual one.
NAMES = ("firefox-esr", "firefox")
#: The page background of the dark theme in style.css.
DARK = "rgb(20, 20, 25)"


def test_playground_in_firefox(node: None, playing: Server) -> None:
    """The main path: generate, reload, open, vary, compare, and repaint; in the dark theme, and as wide as a phone."""
    command = ["node", "firefox.mjs", find_executable(NAMES), playing.url, "test/null", "seen in Firefox"]
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR", "LANG")}
    process = subprocess.run(command, cwd=JS, env=environment, capture_output=True, text=True, timeout=180)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert (report["size"], report["kept"]) == ([1024, 768], "seen in Firefox")
    assert report["state"].startswith("Seed ")
    assert "Endpointtest/null" in report["shown"] and "Seed" in report["compared"]
    assert (report["errors"], report["foreign"]) == ([], [])
    assert report["overflow"] <= 0
    assert report["ground"] == DARK


def violations(page: Page) -> list[str]:
    """Return axe's serious and critical violations: the rule, the element and the reason."""
    source = (JS / "node_modules" / "axe-core" / "axe.min.js").read_text()
    # Run axe through the debugger, because the page's content security policy blocks other scripts.
    page.evaluate(source + "\n;0")
    results: Any = page.evaluate("async () => (await axe.run()).violations")
    return [
        f"{rule['id']}: {node['target']}: {node['failureSummary']}"
        for rule in results
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


DISPLAYS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "has_touch": True},
    # The narrowest width at which a page must not scroll sideways, by WCAG 2.2, 1.4.10.
    "narrow, dark": {"viewport": {"width": 320, "height": 640}, "color_scheme": "dark", "reduced_motion": "reduce"},
}


#: Each width and each colour scheme once.
USUAL = ("desktop", "narrow, dark")


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in USUAL else pytest.mark.thorough, id=name) for name in DISPLAYS]
)
def page(request: pytest.FixtureRequest, browser: Browser, playing: Server) -> Iterator[Page]:
    yield from open_page(browser, playing.url, **DISPLAYS[request.param])


def fits(page: Page) -> bool:
    """Return whether nothing is wider than the window, and nothing in the form wider than the form."""
    right = "element => element.getBoundingClientRect().right"
    parts = page.locator("#form :is(label, input, select, textarea, button)").evaluate_all(f"all => all.map({right})")
    is_in_form = not parts or max(parts) <= page.locator("#form").evaluate(right)
    return is_in_form and bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def test_playground_is_accessible(node: None, page: Page) -> None:
    """Check the empty form, all settings with images and invalid fields, the code tab and the key dialog."""
    choose(page, "test/null")
    assert violations(page) == []
    expect(run(page, "an image").locator("figure img")).to_be_visible()
    choose(page, "test/lora")
    page.get_by_text("More settings").click()
    page.get_by_role("button", name="Add").click()
    page.get_by_label("Guidance scale", exact=True).fill("99")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("[aria-invalid=true]").first).to_be_visible()
    page.get_by_text("Request, response and logs").first.click()
    assert violations(page) == []
    assert fits(page)
    page.get_by_role("tab", name="Code").click()
    assert violations(page) == []
    assert fits(page)
    page.evaluate("document.getElementById('ask').showModal()")
    assert violations(page) == []


def test_dialogs_are_accessible(node: None, page: Page) -> None:
    """Check the grid with two images, the lightbox with its keys, the question before a deletion, and a comparison."""
    choose(page, "test/null")
    for prompt in ("one image", "another image"):
        expect(run(page, prompt).locator("figure img")).to_be_visible()
    assert violations(page) == []
    page.locator("a.open").first.click()
    page.locator("dialog.lightbox").get_by_text("Keys").click()
    assert violations(page) == []
    assert fits(page)
    page.locator("dialog.lightbox").get_by_role("button", name="Delete").click()
    expect(page.locator("dialog.confirm")).to_be_visible()
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.locator("dialog.lightbox").get_by_role("button", name="Compare").click()
    page.locator("a.open").nth(1).click()
    expect(page.locator("dialog.compare img")).to_have_count(2)
    assert violations(page) == []
    assert fits(page)


def test_api_page_is_accessible(node: None, browser: Browser, playing: Server) -> None:
    """Check the list of operations, with one of each method open."""
    for page in open_page(browser, f"{playing.url}/docs"):
        for method in ("get", "post", "put", "delete"):
            operation = page.locator(f".opblock-{method}").first
            operation.locator(".opblock-summary-control").click()
            expect(operation.locator(".responses-table").first).to_be_visible()
            operation.get_by_role("button", name="Try it out").click()
        assert violations(page) == []
        page.get_by_role("button", name="Authorize", exact=True).first.click()
        expect(page.locator(".dialog-ux .modal-ux")).to_be_visible()
        assert violations(page) == []


def test_reduced_motion_is_respected(browser: Browser, playing: Server) -> None:
    """The buttons over an image fade in, except for users who asked for less motion."""
    for motion, expected in (("no-preference", "0.15s"), ("reduce", "0s")):
        for page in open_page(browser, playing.url, reduced_motion=motion):
            choose(page, "test/null")
            expect(run(page, "still").locator("figure img")).to_be_visible()
            duration = "button => getComputedStyle(button).transitionDuration"
            assert page.locator(".tools .icon").first.evaluate(duration) == expected


def test_brush_is_accessible(node: None, page: Page) -> None:
    choose(page, "test/null")
    expect(run(page, "one image").locator("figure img")).to_be_visible()
    page.locator("a.open").click()
    page.locator("dialog.lightbox").get_by_role("button", name="Repaint a part").click()
    expect(page.locator("dialog.mask canvas")).to_be_focused()
    assert violations(page) == []
    assert fits(page)


def bytes_of_a_visit(browser: Browser, url: str) -> dict[str, int]:
    """Return the transferred bytes of a visit with an empty cache, by URL: page, style, scripts, and the first form."""
    context = browser.new_context()
    page = context.new_page()
    loaded: dict[str, int] = {}
    page.on("requestfinished", lambda sent: loaded.update({sent.url: sent.sizes()["responseBodySize"]}))
    page.goto(url)
    page.wait_for_selector("body[data-ready]")
    page.wait_for_load_state("networkidle")
    context.close()
    return loaded


@pytest.mark.parametrize("path", ["/", "/status"])
def test_first_visit_loads_little(browser: Browser, playing: Server, path: str) -> None:
    loaded = bytes_of_a_visit(browser, f"{playing.url}{path}")
    assert {f"{playing.url}/static/style.css", f"{playing.url}/static/elements.js"} <= loaded.keys()
    assert sum(loaded.values()) <= 100_000, loaded


def test_status_page_is_accessible(node: None, page: Page, playing: Server) -> None:
    httpx.post(f"{playing.url}/test/null", json={"prompt": "x"}, trust_env=False).raise_for_status()
    httpx.post(f"{playing.url}/test/raises", json={"prompt": "x"}, trust_env=False)
    page.goto(f"{playing.url}/status")
    expect(page.locator("#failures")).to_contain_text("test/raises")
    assert violations(page) == []
    assert fits(page)
    page.evaluate("document.getElementById('ask').showModal()")
    assert violations(page) == []


def test_the_queue_is_accessible(node: None, page: Page, gate: Gate) -> None:
    """Check a request that runs, one that waits, one that failed, and an image that is chosen to compare."""
    choose(page, "test/null")
    expect(run(page, "compared").locator("figure img")).to_be_visible()
    page.get_by_role("button", name="Compare").first.click()
    choose(page, "test/raises")
    expect(run(page, "fails").locator(".state")).to_contain_text("error", ignore_case=True)
    choose(page, "test/gate")
    run(page, str(gate.path))
    choose(page, "test/null")
    run(page, "waits")
    expect(page.locator("#queue li")).to_have_count(2)
    expect(page.locator("#comparing")).to_be_visible()
    assert violations(page) == []
    assert fits(page)
    gate.release_all()
    expect(page.locator("#queue")).to_be_hidden()


def tab_to(page: Page, selector: str) -> None:
    """Press Tab until an element that the selector matches has the focus."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"Tab does not reach {selector}")


@pytest.mark.parametrize("page", ["desktop"], indirect=True)
def test_tab_reaches_the_queue_and_what_an_image_offers(page: Page, gate: Gate) -> None:
    """Come to the queue before the images, however many there are."""
    choose(page, "test/null")
    expect(run(page, "an image").locator("figure img")).to_be_visible()
    choose(page, "test/gate")
    run(page, str(gate.path))
    page.get_by_role("tab", name="Images").focus()
    for selector in ("#cancel-all", "#queue-list button", "#search", "#runs a.open", "#runs .tools button"):
        tab_to(page, selector)
    page.locator("#runs a.open").focus()
    page.keyboard.press("Enter")
    expect(page.locator("dialog.lightbox")).to_be_visible()
    tab_to(page, "dialog.lightbox select")
    page.keyboard.press("Escape")
    expect(page.locator("#runs a.open")).to_be_focused()
    gate.release_all()
    expect(page.locator("#queue")).to_be_hidden()


@pytest.mark.parametrize("page", ["desktop"], indirect=True)
def test_screen_readers_hear_the_end_of_a_request_and_no_steps(page: Page, gate: Gate) -> None:
    choose(page, "test/gate")
    state = run(page, str(gate.path)).locator(".state")
    gate.release(2)
    expect(state).to_have_text("Step 2 of 28")
    expect(state).to_have_attribute("aria-live", "off")
    gate.release_all()
    expect(state).to_contain_text("Seed")
    expect(state).to_have_attribute("aria-live", "polite")
    expect(page.locator("#announcement")).to_have_attribute("role", "status")


def test_playground_works_with_the_keyboard(page: Page) -> None:
    """Tab, Enter and the arrow keys suffice to generate an image and to open the code tab."""
    choose(page, "test/null")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "field-prompt":
            break
    page.keyboard.type("by keyboard")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#runs > li.run").first.locator("figure img")).to_be_visible()
    page.get_by_role("tab", name="Images").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Code")).to_be_focused()
    expect(page.locator("pre[data-language=curl]")).to_contain_text("by keyboard")
