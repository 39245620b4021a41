"""The playground in a real browser: submit, follow, cancel and delete requests, and keep a history."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from tests.support.image_files import encode, noise_image
from tests.support.server_process import Gate, Server, free_port, serving
from tests.web.test_browser_client import browser as browser


@pytest.fixture(scope="module")
def playing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve only the test models and run one request at a time."""
    settings = {"max_running": "1", "tls_port": str(free_port())}
    with serving(tmp_path_factory.mktemp("playing"), "test/null=demo", **settings) as server:
        yield server.ready()


@pytest.fixture
def page(browser: Browser, playing: Server) -> Iterator[Page]:
    yield from open_page(browser, playing.url)


def open_page(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """Yield a page in a new context. Fail at the end if it had errors, policy violations or foreign requests."""
    context = browser.new_context(**options)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda log: problems.append(log.text) if "Content Security Policy" in log.text else None)
    page.on("request", lambda request: problems.append(request.url) if is_foreign(request.url, url) else None)
    page.goto(url)
    yield page
    context.close()
    assert problems == []


def size_of(image: Locator) -> Any:
    """Return an image's natural width and height, once it is decoded."""
    return image.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")


def pixel_of(image: Locator) -> Any:
    """Return the colour of an image scaled down to one pixel."""
    return image.evaluate("""async (image) => {
        await image.decode();
        const canvas = new OffscreenCanvas(1, 1).getContext("2d");
        canvas.drawImage(image, 0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    }""")


def is_foreign(url: str, server_url: str) -> bool:
    return urlsplit(url).scheme in ("http", "https") and urlsplit(url).netloc != urlsplit(server_url).netloc


def choose(page: Page, endpoint: str) -> None:
    """Select an endpoint and wait for its form."""
    page.wait_for_selector("body[data-ready]")
    page.get_by_label("Endpoint").select_option(endpoint)
    page.wait_for_selector(f"body[data-ready='{endpoint}']")


def press(page: Page, prompt: str) -> None:
    """Enter a prompt and press Run without waiting for the result."""
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Run").click()


def run(page: Page, prompt: str) -> Any:
    """Enter a prompt and press Run; return the new run, which is the first in the list."""
    press(page, prompt)
    newest = page.locator("#runs > li.run").first
    expect(newest.locator(".prompt")).to_have_text(prompt)
    return newest


def confirm_delete(page: Page) -> None:
    """Agree in the dialog that asks whether to delete a request with images."""
    page.locator("dialog.confirm").get_by_role("button", name="Delete").click()


def test_run_shows_the_image(page: Page) -> None:
    choose(page, "test/null")
    shown = run(page, "a red apple")
    image = shown.get_by_role("img", name="a red apple")
    expect(image).to_be_visible()
    assert size_of(image) == [1024, 768]
    expect(shown.locator(".state")).to_contain_text("Seed")


def test_run_shows_queue_position_steps_and_cancel(page: Page, gate: Gate) -> None:
    choose(page, "test/gate")
    page.get_by_text("More settings").click()
    page.get_by_label("Number of inference steps", exact=True).fill("3")
    running = run(page, str(gate.path))
    expect(running.locator(".state")).to_have_text("Ready to start")
    choose(page, "test/null")
    waiting = run(page, "second")
    expect(waiting.locator(".state")).to_have_text("Next in queue")
    cancelled = run(page, "third")
    expect(cancelled.locator(".state")).to_have_text("Waiting, 1 request ahead")
    cancelled.get_by_role("button", name="Cancel").click()
    expect(cancelled.locator(".state")).to_have_text("Cancelled")
    gate.release(2)
    oldest = page.locator("#runs > li.run").nth(2)
    expect(oldest.locator(".state")).to_have_text("Step 2 of 3")
    expect(oldest.locator(".preview")).to_be_visible()
    gate.release_all()
    expect(oldest.locator("figure img")).to_be_visible()
    expect(page.locator("#runs > li.run").nth(1).locator("figure img")).to_be_visible()


def test_an_image_moves_nothing_when_it_comes(page: Page, gate: Gate) -> None:
    """Keep its place free, and offer variations in the place of Cancel only after a while."""
    choose(page, "test/gate")
    page.get_by_text("More settings").click()
    page.get_by_label("Number of inference steps", exact=True).fill("3")
    card = run(page, str(gate.path))
    gate.release(2)
    expect(card.locator(".preview")).to_be_visible()
    before = card.locator(".images").bounding_box()
    gate.release_all()
    expect(card.locator("figure img")).to_be_visible()
    after = card.locator(".images").bounding_box()
    assert before and after and before["y"] == after["y"]
    assert before["height"] == pytest.approx(after["height"], abs=2)
    expect(card.get_by_role("button", name="3 variations")).to_be_visible()
    expect(card.get_by_role("button", name="Cancel")).to_be_hidden()


def test_history_survives_a_reload_and_reproduces_the_image(page: Page) -> None:
    choose(page, "test/null")
    first = run(page, "kept")
    source = first.locator("figure img").get_attribute("src")
    page.reload()
    reloaded = page.locator("#runs > li.run").first
    expect(reloaded.locator("figure img")).to_have_attribute("src", str(source))
    reloaded.get_by_role("button", name="Use these settings").click()
    expect(page.get_by_label("Prompt")).to_have_value("kept")
    # The server chose the seed. With this seed the rerun produces the same image, whose colour depends on the seed.
    rerun = run(page, "kept")
    expect(rerun.locator("figure img")).not_to_have_attribute("src", str(source))
    assert pixel_of(rerun.locator("figure img")) == pixel_of(reloaded.locator("figure img"))
    for each in (rerun, reloaded):
        each.get_by_role("button", name="Delete").click()
        confirm_delete(page)
    expect(page.get_by_text("Images you generate appear here.")).to_be_visible()


def test_earlier_requests_of_the_key_are_listed(browser: Browser, playing: Server, page: Page) -> None:
    """Requests of another program load page by page, failed ones included. This browser's runs are not repeated."""
    choose(page, "test/null")
    run(page, "my own")
    with httpx.Client(base_url=playing.url, timeout=60, trust_env=False) as client:
        client.post("/test/raises", json={"prompt": "failed elsewhere"})
        for number in range(21):
            client.post("/test/null", json={"prompt": f"elsewhere {number}"}).raise_for_status()
    earlier = page.get_by_role("button", name="Show earlier requests")
    earlier.click()
    expect(page.locator("#runs > li.run")).to_have_count(21)
    expect(page.get_by_role("img", name="elsewhere 20")).to_be_visible()
    earlier.click()
    failed = page.locator("#runs > li.run", has_text="failed elsewhere")
    expect(failed.locator(".state")).to_have_text("Internal Server Error")
    expect(page.locator("#runs > li.run .prompt", has_text="my own")).to_have_count(1)
    # The page says which are not its own.
    expect(failed.get_by_text("Sent by another program")).to_be_visible()
    expect(page.locator("#runs > li.run", has_text="my own").get_by_text("Sent by another program")).to_be_hidden()


def test_a_search_finds_earlier_requests(page: Page, playing: Server) -> None:
    """Look at the server's requests if none on the page fits."""
    httpx.post(f"{playing.url}/test/null", json={"prompt": "a zebra of another program"}, trust_env=False)
    page.wait_for_selector("body[data-ready]")
    page.get_by_role("searchbox", name="Search").fill("zebra")
    expect(page.get_by_role("img", name="a zebra of another program")).to_be_visible()
    page.get_by_role("searchbox", name="Search").fill("no such words")
    expect(page.locator("#empty")).to_contain_text("No image matches.")


def test_seed_is_locked_and_randomized(page: Page) -> None:
    choose(page, "test/null")
    seed = page.get_by_label("Seed", exact=True)
    first = run(page, "any seed")
    expect(first.locator(".state")).to_contain_text("Seed")
    page.get_by_role("button", name="Lock").click()
    expect(first.locator(".state")).to_contain_text(f"Seed {seed.input_value()}")
    expect(page.get_by_role("button", name="Lock")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Lock").click()
    expect(seed).to_have_value("")
    page.get_by_role("button", name="New seed").click()
    expect(seed).to_have_value(re.compile(r"\d+"))


def test_use_as_input_fills_the_image_to_image_form(page: Page) -> None:
    choose(page, "test/null")
    shown = run(page, "once more")
    source = shown.locator("figure img").get_attribute("src")
    shown.get_by_role("button", name="Use as input").click()
    page.wait_for_selector("body[data-ready='test/copy']")
    expect(page.get_by_label("Image URL")).to_have_value(str(source))
    expect(page.get_by_label("Prompt")).to_have_value("once more")
    assert size_of(run(page, "copied").locator("figure img")) == [1024, 768]


def drop(page: Page) -> None:
    """Drop an image of 96 x 80 on the image field."""
    content = base64.b64encode(encode(noise_image())).decode()
    page.locator("[data-name=image_url]").evaluate(
        """(node, content) => {
            const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "in.png", { type: "image/png" }));
            node.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        content,
    )


def test_dropped_image_is_uploaded(page: Page) -> None:
    choose(page, "test/copy")
    drop(page)
    expect(page.get_by_label("Image URL")).to_have_value(re.compile("/files/"))
    shown = run(page, "copy it")
    assert size_of(shown.locator("figure img")) == [96, 80]


@pytest.mark.parametrize("is_collapsed", [False, True])
def test_invalid_field_is_marked(page: Page, is_collapsed: bool) -> None:
    """An invalid field in the closed section "More settings" is shown, too."""
    choose(page, "test/null")
    page.get_by_text("More settings").click()
    page.get_by_label("Guidance scale", exact=True).fill("99")
    if is_collapsed:
        page.get_by_text("More settings").click()
    page.get_by_role("button", name="Run").click()
    field = page.get_by_label("Guidance scale", exact=True)
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(page.locator("[data-name=guidance_scale] .problem")).to_contain_text("less than or equal to 20")
    expect(field).to_be_focused()


def test_flagged_images_are_blurred(page: Page) -> None:
    choose(page, "test/unsafe")
    shown = run(page, "whatever")
    expect(shown.locator("figure img.flagged")).to_be_visible()
    expect(shown).to_contain_text("Flagged by the safety checker")
    shown.get_by_role("button", name="Show").click()
    expect(shown.locator("figure img.flagged")).to_have_count(0)


def test_failure_is_shown(page: Page) -> None:
    choose(page, "test/raises")
    expect(run(page, "whatever").locator(".state")).to_have_text("Internal Server Error")


def test_wrong_key_reopens_the_dialog(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path, "test/null=demo", keys="right") as server:
        for page in open_page(browser, server.ready().url):
            choose(page, "test/null")
            press(page, "x")
            for key, problem in (("wrong", ""), ("right", "The server rejected this key.")):
                expect(page.locator("#ask-problem")).to_have_text(problem)
                page.get_by_label("API key", exact=True).fill(key)
                page.get_by_role("button", name="Use this key").click()
            expect(page.locator("#runs figure img")).to_be_visible()
            assert page.evaluate("JSON.stringify(localStorage)").find("right") == -1


def test_key_dialog_can_be_cancelled(browser: Browser, tmp_path: Path) -> None:
    """Cancelling drops the action that needs a key and keeps a key that was entered before."""
    with serving(tmp_path, "test/null=demo", keys="right,other") as server:
        for page in open_page(browser, server.ready().url):
            choose(page, "test/null")
            press(page, "x")
            expect(page.locator("#ask")).to_be_visible()
            page.keyboard.press("Escape")
            expect(page.locator("#ask")).to_be_hidden()
            expect(page.locator("#problem")).to_contain_text("requires a valid key")
            page.get_by_role("button", name="API key", exact=True).click()
            page.get_by_label("API key", exact=True).fill("right")
            page.get_by_role("button", name="Use this key").click()
            page.goto(f"{server.url}/status")
            expect(page.locator("#ask-problem")).to_contain_text("Only an operator's key")
            page.get_by_role("button", name="Cancel").click()
            expect(page.locator("#state")).to_contain_text("Only an operator's key")
            page.goto(server.url)
            choose(page, "test/null")
            expect(run(page, "still my key").locator("figure img")).to_be_visible()


def test_dropped_file_asks_for_the_key(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path, "test/null=demo", keys="right") as server:
        for page in open_page(browser, server.ready().url):
            choose(page, "test/copy")
            drop(page)
            page.get_by_label("API key", exact=True).fill("right")
            page.get_by_role("button", name="Use this key").click()
            expect(page.get_by_label("Image URL")).to_have_value(re.compile("/files/"))


def test_many_requests_leave_a_connection_for_cancelling(page: Page, gate: Gate) -> None:
    """With more requests than browser connections, the page still follows each and can cancel the last."""
    choose(page, "test/gate")
    run(page, str(gate.path))
    choose(page, "test/null")
    for number in range(8):
        run(page, f"number {number}")
    last = page.locator("#runs > li.run").first
    expect(last.locator(".state")).to_have_text("Waiting, 7 requests ahead")
    last.get_by_role("button", name="Cancel").click()
    expect(last.locator(".state")).to_contain_text("Cancelled")
    gate.release_all()
    expect(page.locator("#runs figure img")).to_have_count(8)


def test_runs_are_shown_when_the_browser_storage_is_full(page: Page) -> None:
    choose(page, "test/null")
    run(page, "first")
    page.evaluate("localStorage.setItem('filler', 'x'.repeat(5 * 2 ** 20 - 100 - JSON.stringify(localStorage).length))")
    expect(run(page, "the browser is full " * 20).locator("figure img")).to_be_visible()
    expect(run(page, "again").locator("figure img")).to_be_visible()
    assert page.locator("#problem").inner_text() == ""


def test_last_chosen_endpoint_wins(page: Page) -> None:
    """The description of the endpoint chosen first arrives last and is ignored."""
    choose(page, "test/null")
    held: list[Route] = []
    page.route("**/openapi.json?endpoint_id=test%2Finpaint", lambda route: held.append(route))
    page.get_by_label("Endpoint").select_option("test/inpaint")
    page.get_by_label("Endpoint").select_option("test/unsafe")
    page.wait_for_selector("body[data-ready='test/unsafe']")
    held[0].continue_()
    page.wait_for_load_state("networkidle")
    expect(page.get_by_label("Image URL")).to_have_count(0)
    expect(page.get_by_label("Endpoint")).to_have_value("test/unsafe")


def test_delete_removes_the_request_from_the_server(page: Page, playing: Server, gate: Gate) -> None:
    """The server deletes the image, too. A running request is cancelled first."""
    choose(page, "test/null")
    shown = run(page, "a secret")
    source = str(shown.locator("figure img").get_attribute("src"))
    with page.expect_response(lambda response: response.request.method == "DELETE") as deleted:
        shown.get_by_role("button", name="Delete").click()
        confirm_delete(page)
    assert deleted.value.status == 204
    assert httpx.get(source, trust_env=False).status_code == 404
    choose(page, "test/gate")
    running = run(page, str(gate.path))
    expect(running.locator(".state")).to_have_text("Ready to start")
    with page.expect_response(lambda response: response.request.method == "DELETE") as deleted:
        running.get_by_role("button", name="Delete").click()
        gate.release_all()
    assert deleted.value.status == 204


def test_missing_image_shows_a_message(page: Page, playing: Server) -> None:
    """Another client generates the image, so that it is not in this browser's cache."""
    output = httpx.post(f"{playing.url}/test/null", json={"prompt": "for a while"}, trust_env=False).json()
    (playing.data_dir / "files" / output["images"][0]["url"].rpartition("/")[2]).unlink()
    page.wait_for_selector("body[data-ready]")
    page.get_by_role("button", name="Show earlier requests").click()
    shown = page.locator("#runs > li.run", has_text="for a while").first
    expect(shown).to_contain_text("This image is no longer stored")


def test_page_recovers_from_a_server_restart(browser: Browser, tmp_path: Path, gate: Gate) -> None:
    port = str(free_port())
    with serving(tmp_path, "test/null=demo", port=port) as server:
        pages = open_page(browser, server.ready().url)
        page = next(pages)
        choose(page, "test/gate")
        shown = run(page, str(gate.path))
        expect(shown.locator(".state")).to_have_text("Ready to start")
        server.kill()
    expect(shown.locator(".state")).to_contain_text("Cannot reach the server")
    gate.release(28)
    with serving(tmp_path, "test/null=demo", port=port) as server:
        server.ready()
        expect(shown.locator("figure img")).to_be_visible(timeout=30_000)
        assert next(pages, None) is None


def test_status_page(browser: Browser, playing: Server) -> None:
    httpx.post(f"{playing.url}/test/null", json={"prompt": "x"}, trust_env=False).raise_for_status()
    httpx.post(f"{playing.url}/test/raises", json={"prompt": "x"}, trust_env=False)
    for page in open_page(browser, f"{playing.url}/status"):
        expect(page.locator("#state")).to_contain_text("Ready")
        expect(page.locator("#endpoints")).to_contain_text("test/null")
        expect(page.locator("#failures")).to_contain_text("test/raises")
        expect(page.locator("#usage")).to_contain_text("No key")
        expect(page.locator(".bars")).to_have_count(4)
        expect(page.locator(".bars").first.locator("span")).to_have_count(60)
        expect(page.get_by_role("img", name="Images per minute, last hour: peak")).to_be_visible()
        expect(page.locator("#gpus")).to_contain_text("none at all")
        expect(page.locator("#gpus")).to_contain_text("acceleration high: a test")
        expect(page.locator("#gpus")).to_contain_text("as fast as nothing")
        expect(page.locator("#steps")).to_contain_text("1024x768")
        expect(page.locator("#times tbody tr").first).to_contain_text("1024x768none")
        expect(page.locator("#usage")).not_to_contain_text("At fal")


def test_status_page_shows_the_price_at_fal(browser: Browser, tmp_path: Path) -> None:
    """Off by default. The unit that fal bills is a megapixel, rounded up for each image."""
    with serving(tmp_path, "test/null=demo", fal_price="0.025", keys="one", operator_keys="boss") as server:
        server.ready()
        for key, num_images in (("one", 4), ("boss", 2)):
            body = {"prompt": "x", "image_size": "square_hd", "num_images": num_images}
            headers = {"authorization": f"Key {key}"}
            httpx.post(f"{server.url}/test/null", json=body, headers=headers, trust_env=False).raise_for_status()
        for page in open_page(browser, f"{server.url}/status"):
            page.get_by_label("API key", exact=True).fill("boss")
            page.get_by_role("button", name="Use this key").click()
            expect(page.locator("#usage thead")).to_contain_text("At fal, at 0.025 a megapixel")
            expect(page.locator("#usage tbody tr td:last-child")).to_have_text(["0.20", "0.10", "0.30"])
            expect(page.locator("#usage tbody tr").last).to_contain_text("All keys")


def test_swagger_ui(browser: Browser, playing: Server) -> None:
    """Every operation is listed, and one can be tried. `open_page` checks that the page stays on this origin."""
    paths = httpx.get(f"{playing.url}/openapi.json", trust_env=False).json()["paths"]
    for page in open_page(browser, f"{playing.url}/docs"):
        expect(page.locator(".opblock")).to_have_count(sum(len(operations) for operations in paths.values()))
        submit = page.locator(".opblock-post", has_text="/queue/test/null")
        submit.locator(".opblock-summary-control").click()
        expect(submit.get_by_text("Submit a request to the queue")).to_be_visible()
        expect(submit.locator(".highlight-code").first).to_contain_text("prompt")
        health = page.locator(".opblock").filter(has=page.locator("[data-path='/health']"))
        health.locator(".opblock-summary-control").click()
        health.get_by_role("button", name="Try it out").click()
        health.get_by_role("button", name="Execute").click()
        expect(health.locator(".live-responses-table tbody")).to_contain_text("alive")


@pytest.mark.parametrize("path", ["/", "/status", "/docs"])
def test_pages_have_security_headers(playing: Server, path: str) -> None:
    response = httpx.get(f"{playing.url}{path}", trust_env=False)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert {"frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} <= set(policy.split("; "))
    assert response.headers["x-content-type-options"] == "nosniff"
    # The page has no inline script and loads each script from this server.
    sources = re.findall(r"<script\b[^>]*>", response.text)
    assert sources and all(re.search(r'src="(static|docs)/', source) for source in sources)
    assert httpx.head(f"{playing.url}{path}", trust_env=False).status_code == 200


def test_static_files_have_security_headers(playing: Server) -> None:
    for name in ("static/app.js", "static/style.css", "static/icon.svg", "docs/swagger-ui-bundle.js"):
        response = httpx.get(f"{playing.url}/{name}", trust_env=False)
        assert (response.status_code, response.headers["x-content-type-options"]) == (200, "nosniff")
    assert httpx.get(f"{playing.url}/static/../app.py", trust_env=False).status_code == 404
