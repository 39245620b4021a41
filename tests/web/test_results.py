"""The playground's results: the lightbox, comparisons, variations, favourites, and images as inputs."""

import base64
import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from tests.support.server_process import Server
from tests.web.test_browser_client import browser as browser
from tests.web.test_playground import choose, confirm_delete, open_page, run, size_of
from tests.web.test_playground import playing as playing


@pytest.fixture
def page(browser: Browser, playing: Server) -> Iterator[Page]:
    yield from open_page(browser, playing.url, viewport={"width": 1280, "height": 800})


@pytest.fixture
def lightbox(page: Page) -> Locator:
    return page.locator("dialog.lightbox")


def generate(page: Page, *prompts: str, seed: int = 40) -> None:
    """Generate one image for each prompt, with consecutive seeds. The last one is the first in the grid."""
    choose(page, "test/null")
    for number, prompt in enumerate(prompts):
        page.get_by_label("Seed", exact=True).fill(str(seed + number))
        expect(run(page, prompt).locator("figure img")).to_be_visible()


def open_first(page: Page) -> None:
    """Open the first image in the grid."""
    page.locator("a.open").first.click()
    expect(page.locator("dialog.lightbox .stage img")).to_be_visible()


def parameter(dialog: Locator, name: str) -> Locator:
    """Return the value of a parameter next to the image."""
    return dialog.locator(f".parameters dt:text-is('{name}') + dd")


def card(page: Page, prompt: str) -> Locator:
    """Return the request with this prompt in the grid."""
    return page.locator("#runs > li.run", has=page.locator(f".prompt:text-is('{prompt}')")).first


def test_the_lightbox_shows_the_parameters_and_moves_with_the_arrow_keys(page: Page, lightbox: Locator) -> None:
    generate(page, "first", "second")
    page.locator("a.open").first.press("Enter")
    expect(lightbox.locator(".stage img")).to_have_attribute("alt", "second")
    expect(lightbox.locator(".count")).to_have_text("1 of 2")
    expect(parameter(lightbox, "Seed")).to_have_text("41")
    expect(parameter(lightbox, "Size")).to_have_text(re.compile("1024 . 768"))
    page.keyboard.press("ArrowRight")
    expect(lightbox.locator(".stage img")).to_have_attribute("alt", "first")
    expect(parameter(lightbox, "Seed")).to_have_text("40")
    page.keyboard.press("ArrowRight")
    expect(lightbox.locator(".count")).to_have_text("1 of 2")
    page.keyboard.press("Escape")
    expect(lightbox).to_have_count(0)
    expect(page.locator("a.open").first).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("a.open").nth(1)).to_be_focused()


def test_the_lightbox_zooms_to_pixels(page: Page, lightbox: Locator) -> None:
    generate(page, "zoomed")
    open_first(page)
    image = lightbox.locator(".stage img")
    assert image.evaluate("image => image.width") < 1024
    widths = []
    for _ in range(3):
        page.keyboard.press("z")
        widths.append(image.evaluate("image => image.width"))
    assert widths[:2] == [1024, 4096]
    assert widths[2] < 1024


def test_an_image_is_downloaded_under_its_prompt_and_seed(page: Page, lightbox: Locator) -> None:
    generate(page, "Ein Fuchs, im Schnee!")
    open_first(page)
    with page.expect_download() as download:
        page.keyboard.press("d")
    assert download.value.suggested_filename == "ein-fuchs-im-schnee-40.jpg"
    with Image.open(download.value.path()) as image:
        assert image.size == (1024, 768)


def test_an_image_is_copied_as_a_file(browser: Browser, playing: Server) -> None:
    for page in open_page(browser, playing.url, permissions=["clipboard-read", "clipboard-write"]):
        generate(page, "copied")
        open_first(page)
        page.get_by_role("button", name="Copy image").click()
        expect(page.locator("dialog.lightbox .announcement")).to_have_text("Copied.")
        content = page.evaluate("""async () => {
            const [item] = await navigator.clipboard.read();
            const bytes = new Uint8Array(await (await item.getType("image/png")).arrayBuffer());
            return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
        }""")
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert image.size == (1024, 768)


def test_two_images_are_compared_under_a_slider(page: Page) -> None:
    """The slider uncovers the left image up to its handle. The table lists what differs."""
    generate(page, "left", seed=40)
    generate(page, "right", seed=200)
    card(page, "left").hover()
    card(page, "left").get_by_role("button", name="Compare").click()
    expect(page.locator("#comparing")).to_contain_text("Choose a second image")
    card(page, "right").locator("a.open").click()
    dialog = page.locator("dialog.compare")
    expect(dialog.locator("tr", has=page.locator("th:text-is('Seed')")).locator("td")).to_have_text(["40", "200"])
    slider = dialog.get_by_role("slider")
    expect(slider).to_be_focused()
    assert (red_at(dialog, 0.4), red_at(dialog, 0.6)) == pytest.approx((40, 200), abs=3)
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    assert (red_at(dialog, 0.6), red_at(dialog, 0.8)) == pytest.approx((40, 200), abs=3)
    box: Any = dialog.locator(".pair").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.2, box["y"] + 20)
    assert float(slider.input_value()) == pytest.approx(20, abs=1)
    assert (red_at(dialog, 0.1), red_at(dialog, 0.3)) == pytest.approx((40, 200), abs=3)
    dialog.get_by_role("button", name="Swap").click()
    expect(page.locator("dialog.compare img.left")).to_have_attribute("alt", "right")


def test_a_comparison_is_cancelled_by_escape(page: Page) -> None:
    generate(page, "left", seed=40)
    card(page, "left").hover()
    card(page, "left").get_by_role("button", name="Compare").click()
    page.keyboard.press("Escape")
    expect(page.locator("#comparing")).to_be_hidden()
    expect(card(page, "left").locator("a.open")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("dialog.lightbox")).to_be_visible()


def red_at(dialog: Locator, place: float) -> int:
    """Return the red of the compared images on the screen, at a fraction of their width."""
    with Image.open(io.BytesIO(dialog.locator(".pair").screenshot())) as image:
        red: int = image.convert("RGB").getpixel((int(image.width * place), image.height // 2))[0]  # type: ignore[index]
        return red


def test_variations_have_neighbouring_seeds(page: Page) -> None:
    """One click makes three images with the same settings and the next seeds."""
    generate(page, "vary me")
    bodies: list[Any] = []
    page.on(
        "request", lambda sent: bodies.append(sent.post_data_json) if sent.url.endswith("/queue/test/null") else None
    )
    card(page, "vary me").get_by_role("button", name="Variations").click()
    expect(page.locator("#runs figure img")).to_have_count(4)
    expect(page.locator("#runs .state")).to_contain_text(["Seed 43", "Seed 42", "Seed 41", "Seed 40"])
    assert [body["seed"] for body in bodies] == [41, 42, 43]
    assert {(body["prompt"], body["image_size"], body["num_images"]) for body in bodies} == {
        ("vary me", "landscape_4_3", 1)
    }
    expect(page.locator("#announcement")).to_have_text("3 variations sent. They appear first in the grid.")


def test_the_strength_of_image_to_image_is_varied(page: Page, lightbox: Locator) -> None:
    generate(page, "source")
    card(page, "source").hover()
    card(page, "source").get_by_role("button", name="Use as input").click()
    page.wait_for_selector("body[data-ready='test/copy']")
    page.get_by_label("Strength", exact=True).fill("0.5")
    page.get_by_label("Seed", exact=True).fill("7")
    expect(run(page, "changed").locator("figure img")).to_be_visible()
    open_first(page)
    bodies: list[Any] = []
    page.on(
        "request", lambda sent: bodies.append(sent.post_data_json) if sent.url.endswith("/queue/test/copy") else None
    )
    lightbox.get_by_role("button", name="Vary strength").click()
    expect(page.locator("#runs figure img")).to_have_count(5)
    assert [(body["strength"], body["seed"]) for body in bodies] == [(0.4, 7), (0.6, 7), (0.7, 7)]


def test_an_image_is_sent_to_any_image_input(page: Page, lightbox: Locator) -> None:
    generate(page, "a mask")
    source = str(page.locator("#runs figure img").first.get_attribute("src"))
    open_first(page)
    lightbox.get_by_label("Send to").select_option("test/inpaint mask_url")
    lightbox.get_by_role("button", name="Send").click()
    page.wait_for_selector("body[data-ready='test/inpaint']")
    expect(page.get_by_label("Mask URL")).to_have_value(source)
    expect(page.get_by_label("Mask URL")).to_be_focused()


def test_an_image_is_dragged_to_an_input(page: Page) -> None:
    """An image dropped on a field goes there. Dropped on a form without image inputs, it goes to image to image."""
    generate(page, "dragged")
    image = page.locator("a.open").first
    source = str(image.get_attribute("href"))
    image.drag_to(page.locator("#fields"))
    page.wait_for_selector("body[data-ready='test/copy']")
    expect(page.get_by_label("Image URL")).to_have_value(source)
    choose(page, "test/inpaint")
    image.drag_to(page.locator("[data-name=mask_url]"))
    expect(page.get_by_label("Mask URL")).to_have_value(source)


def test_favourites_are_kept(page: Page) -> None:
    """They survive a reload, also when the list of recent requests does not contain them any more."""
    generate(page, "kept", "other")
    card(page, "kept").hover()
    card(page, "kept").get_by_role("button", name="Favourite").click()
    page.evaluate("localStorage.removeItem('runs')")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    page.get_by_role("button", name="Favourites").click()
    expect(page.locator("#runs > li.run:visible .prompt")).to_have_text(["kept"])
    expect(page.locator("#runs figure img")).to_be_visible()
    expect(card(page, "kept").get_by_role("button", name="Favourite")).to_have_attribute("aria-pressed", "true")
    assert size_of(page.locator("#runs figure img").first) == [1024, 768]


def test_search_finds_a_request_and_days_have_headings(page: Page) -> None:
    generate(page, "a lighthouse at dusk", "a fox")
    # Yesterday, as the browser's own list has it.
    page.evaluate("""() => {
        const [newest, oldest] = JSON.parse(localStorage.getItem("runs"));
        oldest.startedAt -= 24 * 3600 * 1000;
        localStorage.setItem("runs", JSON.stringify([newest, oldest]));
    }""")
    page.reload()
    expect(page.locator("#runs figure img")).to_have_count(2)
    expect(page.locator("#runs .day")).to_have_text(["Today", "Yesterday"])
    page.get_by_role("searchbox", name="Search").fill("dusk light")
    expect(page.locator("#runs > li.run:visible .prompt")).to_have_text(["a lighthouse at dusk"])
    expect(page.locator("#runs .day")).to_have_text(["Yesterday"])
    page.get_by_role("searchbox", name="Search").fill("nothing like it")
    expect(page.locator("#empty")).to_contain_text("No image matches")


def test_delete_asks_first_and_moves_on(page: Page, lightbox: Locator) -> None:
    generate(page, "stays", "goes")
    open_first(page)
    page.keyboard.press("Delete")
    page.locator("dialog.confirm").get_by_role("button", name="Cancel").click()
    expect(parameter(lightbox, "Prompt")).to_have_text("goes")
    page.keyboard.press("Delete")
    confirm_delete(page)
    expect(parameter(lightbox, "Prompt")).to_have_text("stays")
    expect(lightbox.locator(".count")).to_have_text("1 of 1")
    page.keyboard.press("Escape")
    expect(page.locator("#runs > li.run")).to_have_count(1)


def test_a_request_that_cannot_be_deleted_stays(page: Page) -> None:
    """The page tells why, and a second try succeeds."""
    generate(page, "stays")
    page.route("**/queue/**", lambda route: route.abort() if route.request.method == "DELETE" else route.continue_())
    card(page, "stays").get_by_role("button", name="Delete").click()
    confirm_delete(page)
    expect(page.locator("#problem")).not_to_be_empty()
    expect(page.locator("#runs > li.run")).to_have_count(1)
    page.unroute("**/queue/**")
    card(page, "stays").get_by_role("button", name="Delete").click()
    confirm_delete(page)
    expect(page.locator("#runs > li.run")).to_have_count(0)


def test_the_focus_stays_in_the_lightbox(page: Page, lightbox: Locator) -> None:
    """The buttons are made anew after each command; the keys work all the same."""
    generate(page, "first", "second")
    open_first(page)
    lightbox.get_by_role("button", name="Favourite").click()
    expect(lightbox.get_by_role("button", name="Favourite")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(parameter(lightbox, "Prompt")).to_have_text("first")
    page.keyboard.press("F")
    expect(lightbox.get_by_role("button", name="Favourite")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("S")
    expect(page.get_by_label("Prompt")).to_have_value("first")


def test_flagged_images_are_blurred_wherever_they_are_shown(page: Page, lightbox: Locator) -> None:
    choose(page, "test/unsafe")
    for prompt in ("one", "another"):
        expect(run(page, prompt).locator("figure img.flagged")).to_be_visible()
    open_first(page)
    expect(lightbox.locator(".stage img")).to_have_class("flagged")
    lightbox.get_by_role("button", name="Show", exact=True).click()
    expect(lightbox.locator(".stage img.flagged")).to_have_count(0)
    page.keyboard.press("Escape")
    for place in (0, 1):
        page.locator("#runs figure").nth(place).hover()
        page.locator("#runs figure").nth(place).get_by_role("button", name="Compare").click()
    dialog = page.locator("dialog.compare")
    expect(dialog.locator("img.flagged")).to_have_count(2)
    dialog.get_by_role("button", name="Show").click()
    expect(dialog.locator("img.flagged")).to_have_count(0)


def test_a_run_waits_for_an_upload(page: Page) -> None:
    """Run pressed during an upload sends the uploaded file's URL, not a text about the upload."""
    choose(page, "test/copy")
    page.get_by_label("Prompt").fill("uploaded")
    with page.expect_request(lambda request: request.url.endswith("/queue/test/copy")) as sent:
        page.locator("[data-name=image_url] input[type=file]").set_input_files(
            {"name": "in.png", "mimeType": "image/png", "buffer": png()}
        )
        page.get_by_role("button", name="Run").click()
    body: Any = sent.value.post_data_json
    assert "/files/" in body["image_url"]
    expect(page.locator("#runs figure img")).to_be_visible()


def test_a_run_is_not_sent_after_a_failed_upload(page: Page) -> None:
    choose(page, "test/copy")
    page.route("**/storage/upload/initiate", lambda route: route.fulfill(status=413, json={"detail": "Too large."}))
    page.locator("[data-name=image_url] input[type=file]").set_input_files(
        {"name": "in.png", "mimeType": "image/png", "buffer": png()}
    )
    page.get_by_role("button", name="Run").click()
    expect(page.locator("[data-name=image_url] .problem")).to_have_text("Too large.")
    expect(page.locator("#runs > li.run")).to_have_count(0)


def png() -> bytes:
    """Return a PNG of 96 x 80 pixels."""
    content = io.BytesIO()
    Image.new("RGB", (96, 80), (10, 200, 30)).save(content, "PNG")
    return content.getvalue()
