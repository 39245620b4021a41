"""The playground's form and queue: several requests at a time, priorities, estimates, and settings that are kept."""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.server_process import Gate, Server
from tests.web.test_browser_client import browser as browser
from tests.web.test_playground import choose, open_page, press, run
from tests.web.test_playground import playing as playing

#: A link whose values have the wrong types.
ODD = "#test/lora?" + quote('{"loras": [null, 5], "image_size": 7, "seed": "x", "prompt": {"a": 1}, "num_images": []}')
ODD += "&" + quote('{"isPromptPerLine": 7, "numSeeds": "many", "priority": []}')


@pytest.fixture
def page(browser: Browser, playing: Server) -> Iterator[Page]:
    yield from open_page(
        browser, playing.url, viewport={"width": 1280, "height": 800}, permissions=["clipboard-read", "clipboard-write"]
    )


def bodies_of(page: Page, endpoint: str) -> list[Any]:
    """Return a list to which each request to this endpoint adds its body."""
    bodies: list[Any] = []
    page.on("request", lambda sent: bodies.append(sent.post_data_json) if sent.url.endswith(f"/{endpoint}") else None)
    return bodies


def test_several_prompts_and_seeds_are_sent_at_once(page: Page) -> None:
    """Each line of the prompt is a request, with each seed. The button says how many requests it sends."""
    choose(page, "test/null")
    bodies = bodies_of(page, "queue/test/null")
    page.get_by_label("Each line is a request").check()
    page.get_by_label("Repeat with").fill("2")
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_label("Prompt", exact=True).fill("a fox\n\n  a bear \na whale")
    page.get_by_role("button", name="Run 6").click()
    expect(page.locator("#runs figure img")).to_have_count(6)
    assert [(body["prompt"], body["seed"]) for body in bodies] == [
        (prompt, seed) for prompt in ("a fox", "a bear", "a whale") for seed in (7, 8)
    ]


def test_prompts_share_seeds_that_the_page_chooses(page: Page) -> None:
    choose(page, "test/null")
    bodies = bodies_of(page, "queue/test/null")
    page.get_by_label("Each line is a request").check()
    page.get_by_label("Repeat with").fill("2")
    page.get_by_label("Prompt", exact=True).fill("one\ntwo")
    page.get_by_role("button", name="Run 4").click()
    expect(page.locator("#runs figure img")).to_have_count(4)
    first, second, third, fourth = (body["seed"] for body in bodies)
    assert (first, second) == (third, fourth)
    assert second == first + 1


def test_too_many_requests_are_refused_before_the_first(page: Page) -> None:
    choose(page, "test/null")
    bodies = bodies_of(page, "queue/test/null")
    page.get_by_label("Each line is a request").check()
    page.get_by_label("Repeat with").fill("51")
    page.get_by_label("Prompt", exact=True).fill("one\ntwo")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#problem")).to_have_text("These are 102 requests. Send at most 100 at a time.")
    assert bodies == []
    page.get_by_role("tab", name="Code").click()
    expect(page.locator("#code")).to_contain_text("The form sends 102 requests. These programs send the first.")
    expect(page.locator("#code pre").first).to_contain_text('"prompt": "one"')


def queue_two(page: Page, gate: Gate) -> None:
    """Send a request that runs until the gate lets it end, then "apple" and "bread", which wait."""
    choose(page, "test/gate")
    run(page, str(gate.path))
    choose(page, "test/null")
    for prompt in ("apple", "bread"):
        run(page, prompt)


def test_the_queue_panel_estimates_and_cancels(page: Page, gate: Gate) -> None:
    """It shows positions, and the time left as soon as a step is measured. One request or all can be cancelled.

    It is always in sight, and moves no image.
    """
    choose(page, "test/null")
    for prompt in ("one", "two", "three"):
        expect(run(page, prompt).locator("figure img")).to_be_visible()
    choose(page, "test/gate")
    place = page.locator("#runs").bounding_box()
    run(page, str(gate.path))
    panel = page.locator("#queue")
    expect(panel.locator("li")).to_have_count(1)
    expect(panel).to_be_in_viewport(ratio=1)
    moved = page.locator("#runs").bounding_box()
    assert place and moved and (place["x"], place["y"]) == (moved["x"], moved["y"])
    choose(page, "test/null")
    for prompt in ("second", "third", "fourth"):
        run(page, prompt)
    expect(panel.locator("li:not(.gone) .prompt")).to_have_text([str(gate.path), "second", "third", "fourth"])
    expect(panel.locator("li .state").nth(2)).to_contain_text("Waiting, 1 request ahead")
    gate.release(3)
    expect(panel.locator("li .state").first).to_have_text(
        re.compile(r"Step 3 of 28, about \d+ (seconds?|minutes) left")
    )
    expect(panel.locator("li .state").nth(3)).to_have_text(re.compile(r"Waiting, 2 requests ahead, about .* left"))
    expect(panel.get_by_role("heading")).to_have_text(re.compile(r"Queue: 4 requests, about .* left"))
    panel.locator("li", has_text="third").get_by_role("button", name="Cancel").click()
    expect(panel.locator("li:not(.gone) .prompt")).to_have_text([str(gate.path), "second", "fourth"])
    assert page.evaluate("scrollY") == 0
    # It is on the code tab too, and can be folded.
    page.get_by_role("tab", name="Code").click()
    panel.get_by_role("button", name="Hide").click()
    expect(panel.locator("li").first).to_be_hidden()
    panel.get_by_role("button", name="Show").click()
    expect(panel.locator("li").first).to_be_visible()
    page.get_by_role("tab", name="Images").click()
    panel.get_by_role("button", name="Cancel all").click()
    gate.release_all()
    expect(panel).to_be_hidden()
    expect(page.get_by_role("tab", name="Images")).to_be_focused()
    expect(page.locator("#runs > li.run .state")).to_contain_text([*["Cancelled"] * 4, *["Seed"] * 3])


def test_no_row_moves_under_the_pointer(page: Page, gate: Gate) -> None:
    """A row that leaves keeps its place until the pointer leaves the panel, so a second click hits no other row."""
    queue_two(page, gate)
    rows = page.locator("#queue li:not(.gone)")
    bread = rows.filter(has_text="bread")
    before = bread.bounding_box()
    rows.filter(has_text="apple").get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("heading", name="Queue: 2 requests")).to_be_visible()
    assert bread.bounding_box() == before
    page.mouse.move(5, 5)
    expect(rows).to_have_count(2)
    gate.release_all()
    expect(page.locator("#queue")).to_be_hidden()


def test_a_request_that_cannot_be_cancelled_stays(page: Page, gate: Gate) -> None:
    """The page says why, and "Cancel all" counts only what the server cancelled."""
    choose(page, "test/gate")
    run(page, str(gate.path))
    panel = page.locator("#queue")
    page.route("**/cancel", lambda route: route.fulfill(status=503, json={"detail": "The disk is full."}))
    panel.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator("#problem")).to_have_text("The disk is full.")
    panel.get_by_role("button", name="Cancel all").click()
    expect(page.locator("#announcement")).to_have_text("0 requests cancelled.")
    expect(panel.locator("li:not(.gone) .prompt")).to_have_text([str(gate.path)])
    gate.release_all()
    expect(page.locator("#runs figure img")).to_have_count(1)


def test_the_focus_moves_on_when_a_request_leaves_the_queue(page: Page, gate: Gate) -> None:
    queue_two(page, gate)
    rows = page.locator("#queue li:not(.gone)")
    rows.filter(has_text="apple").get_by_role("button", name="Cancel").click()
    expect(rows.locator(".prompt")).to_have_text([str(gate.path), "bread"])
    expect(rows.filter(has_text="bread").get_by_role("button", name="Lower priority")).to_be_focused()
    gate.release_all()
    expect(page.locator("#queue")).to_be_hidden()


def test_the_priority_of_a_request_that_has_begun_cannot_change(page: Page, gate: Gate) -> None:
    """A request that was taken from the queue can still be sent again before its first step."""
    choose(page, "test/gate")
    run(page, str(gate.path))
    row = page.locator("#queue li")
    expect(row.locator(".state")).to_contain_text("Ready to start")
    expect(row.get_by_role("button", name="Lower priority")).to_be_visible()
    gate.release(1)
    expect(row.locator(".state")).to_contain_text("Step 1 of 28")
    expect(row.get_by_role("button", name="Lower priority")).to_be_hidden()
    gate.release_all()
    expect(page.locator("#runs figure img")).to_have_count(1)


def test_time_left_follows_the_order_in_which_requests_end(page: Page) -> None:
    """Steps take 2 seconds, the running request with the least work left is first, and others' requests count too."""
    assert page.evaluate("""async () => {
        const { secondsLeft } = await import("./static/estimate.js");
        const line = (step) => ({ message: `step ${step}/10`, timestamp: new Date(2000 * step).toISOString() });
        const runs = [
            { name: "last", position: 2, step: 0, numSteps: 0, logs: [], input: { num_inference_steps: 5 } },
            { name: "long", position: null, step: 2, numSteps: 10, logs: [line(1), line(2)], input: {} },
            { name: "short", position: null, step: 8, numSteps: 10, logs: [line(7), line(8)], input: {} },
        ];
        return secondsLeft(runs).map(([run, seconds]) => [run.name, seconds]);
    }""") == [["short", 4], ["long", 20], ["last", 20 + 3 * 10]]


def test_requests_are_reordered_by_priority(page: Page, gate: Gate) -> None:
    """A request of lowered priority comes after the others, and can be raised again."""
    queue_two(page, gate)
    panel = page.locator("#queue")
    panel.locator("li", has_text="apple").get_by_role("button", name="Lower priority").click()
    expect(panel.locator("li:not(.gone) .prompt")).to_have_text([str(gate.path), "bread", "apple"])
    expect(page.locator("#runs > li.run")).to_have_count(3)
    panel.locator("li", has_text="apple").get_by_role("button", name="Raise priority").click()
    expect(panel.locator("li", has_text="apple").get_by_role("button", name="Lower priority")).to_be_visible()
    page.get_by_label("Priority").select_option("low")
    press(page, "cake")
    expect(panel.locator("li", has_text="cake").get_by_role("button", name="Raise priority")).to_be_visible()
    expect(panel.locator("li:not(.gone) .prompt")).to_have_text([str(gate.path), "bread", "apple", "cake"])
    gate.release_all()
    expect(page.locator("#runs figure img")).to_have_count(4)


def test_settings_are_remembered_for_each_endpoint(page: Page) -> None:
    choose(page, "test/null")
    page.get_by_label("Prompt", exact=True).fill("a fox")
    page.get_by_role("button", name=re.compile("512.512")).click()
    page.get_by_label("Number of images", exact=True).fill("3")
    page.get_by_label("Repeat with").fill("4")
    choose(page, "test/unsafe")
    page.get_by_label("Repeat with").fill("2")
    page.get_by_label("Priority").select_option("low")
    page.get_by_label("Number of images", exact=True).fill("2")
    page.reload()
    page.wait_for_selector("body[data-ready='test/unsafe']")
    expect(page.get_by_label("Number of images", exact=True)).to_have_value("2")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a fox")
    expect(page.get_by_label("Repeat with")).to_have_value("2")
    expect(page.get_by_label("Priority")).to_have_value("low")
    choose(page, "test/null")
    expect(page.get_by_label("Number of images", exact=True)).to_have_value("3")
    expect(page.get_by_label("Width in pixels")).to_have_value("512")
    expect(page.get_by_role("button", name="Run 4")).to_be_visible()
    page.get_by_label("Each line is a request").check()
    page.get_by_label("Prompt", exact=True).fill("a fox\na bear")
    expect(page.get_by_role("button", name="Run 8")).to_be_visible()
    # The prompt goes along to another endpoint, and so does what its lines mean.
    choose(page, "test/unsafe")
    expect(page.get_by_role("button", name="Run 4")).to_be_visible()
    choose(page, "test/null")
    page.reload()
    page.wait_for_selector("body[data-ready='test/null']")
    expect(page.get_by_label("Each line is a request")).to_be_checked()
    page.get_by_role("button", name="Reset").click()
    page.reload()
    page.wait_for_selector("body[data-ready='test/null']")
    expect(page.get_by_label("Number of images", exact=True)).to_have_value("1")
    expect(page.get_by_label("Each line is a request")).not_to_be_checked()
    expect(page.get_by_label("Repeat with")).to_have_value("1")


def test_a_link_holds_the_settings(browser: Browser, playing: Server, page: Page) -> None:
    """The link opens the endpoint with its settings in another browser, and an open page follows a pasted link."""
    choose(page, "test/null")
    page.get_by_label("Prompt", exact=True).fill("100 % of a fox & friends?\na bear")
    page.get_by_label("Seed", exact=True).fill("11")
    page.get_by_label("Each line is a request").check()
    page.get_by_label("Repeat with").fill("3")
    page.get_by_label("Priority").select_option("low")
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("#announcement")).to_have_text("The link is copied.")
    link = page.evaluate("navigator.clipboard.readText()")
    for other in open_page(browser, link):
        other.wait_for_selector("body[data-ready='test/null']")
        expect(other.get_by_label("Prompt", exact=True)).to_have_value("100 % of a fox & friends?\na bear")
        expect(other.get_by_label("Seed", exact=True)).to_have_value("11")
        expect(other.get_by_role("button", name="Run 6")).to_be_visible()
        expect(other.get_by_label("Priority")).to_have_value("low")
        # The address holds the settings until they change.
        assert other.url == link
        other.get_by_label("Seed", exact=True).fill("12")
        expect(other).to_have_url(f"{playing.url}/")
    choose(page, "test/unsafe")
    page.get_by_label("Prompt", exact=True).fill("something else")
    page.goto(link)
    page.wait_for_selector("body[data-ready='test/null']")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("100 % of a fox & friends?\na bear")


@pytest.mark.parametrize(
    ("fragment", "problem"),
    [
        ("#no/such?%7B%7D", "This server has no endpoint no/such"),
        ("#test/null?%7Bbroken", ""),
        ("#test/null?[1]", ""),
        ("#test/null?%7B%7D&null", ""),
        (ODD, ""),
    ],
)
def test_a_bad_link_does_no_harm(browser: Browser, playing: Server, fragment: str, problem: str) -> None:
    for page in open_page(browser, f"{playing.url}/{fragment}"):
        page.wait_for_selector("body[data-ready]")
        expect(page.locator("#problem")).to_contain_text(problem)
        choose(page, "test/null")
        expect(run(page, "still works").locator("figure img")).to_be_visible()


def test_without_access_to_the_clipboard_the_link_is_the_address(browser: Browser, playing: Server) -> None:
    for page in open_page(browser, playing.url):
        page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        page.reload()
        choose(page, "test/null")
        page.get_by_label("Prompt", exact=True).fill("a fox")
        page.get_by_role("button", name="Copy link").click()
        expect(page.locator("#problem")).to_contain_text("copy it from the address bar")
        assert page.url.startswith(f"{playing.url}/#test/null?")
