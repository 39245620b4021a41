"""A whole visit to the playground: five things that a new user does, with a record of every request."""

from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, expect

from tests.support.server_process import Server
from tests.web.test_browser_client import browser as browser
from tests.web.test_mask import stroke
from tests.web.test_playground import choose, run
from tests.web.test_playground import playing as playing
from tests.web.test_results import card, open_first


def test_nothing_leaves_the_origin(browser: Browser, playing: Server) -> None:
    """Make variations, compare, repaint a part, find an earlier image, and take it into code; then see the status."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    requested: list[str] = []
    context.on("request", lambda request: requested.append(request.url))
    page.goto(playing.url)
    choose(page, "test/null")
    expect(run(page, "a boat").locator("figure img")).to_be_visible()
    vary_and_compare(page)
    repaint(page)
    page.reload()
    page.get_by_role("button", name="Show earlier requests").click()
    page.get_by_role("searchbox", name="Search").fill("boat")
    expect(page.locator("#runs > li.run:visible").first).to_be_visible()
    open_first(page)
    page.locator("dialog.lightbox").get_by_role("button", name="Show code").click()
    expect(page.locator("#code pre:visible")).to_contain_text("boat")
    for path in ("status", "docs"):
        page.goto(f"{playing.url}/{path}")
        page.wait_for_load_state("networkidle")
    context.close()
    networked = [url for url in requested if urlsplit(url).scheme not in ("data", "blob")]
    assert len(networked) > 50
    assert {f"{urlsplit(url).scheme}://{urlsplit(url).netloc}" for url in networked} == {playing.url}
    # Every module was loaded, so every part of the page took part.
    modules = {urlsplit(url).path.rpartition("/")[2] for url in networked if "/static/" in url}
    assert {path.name for path in STATIC.glob("*.js")} <= modules


STATIC = Path(__file__).parents[2] / "server" / "static"


def vary_and_compare(page: Page) -> None:
    """Make three variations, and compare two of them."""
    card(page, "a boat").get_by_role("button", name="Variations").click()
    expect(page.locator("#runs figure img")).to_have_count(4)
    for place in (0, 1):
        page.locator("#runs > li.run").nth(place).hover()
        page.locator("#runs > li.run").nth(place).get_by_role("button", name="Compare").click()
    expect(page.locator("dialog.compare img")).to_have_count(2)
    page.keyboard.press("Escape")


def repaint(page: Page) -> None:
    """Draw a mask over the first image, and run."""
    open_first(page)
    page.locator("dialog.lightbox").get_by_role("button", name="Repaint a part").click()
    expect(page.locator("dialog.mask canvas")).to_be_focused()
    stroke(page, (0.4, 0.4), (0.6, 0.6))
    page.get_by_role("button", name="Use mask").click()
    expect(page.get_by_label("Prompt")).to_be_focused()
    expect(page.get_by_label("Prompt")).to_have_value("a boat")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#runs figure img")).to_have_count(5)
