"""The playground's brush: draw a mask over an image by mouse and by keyboard, and repaint a part of a result."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from tests.support.server_process import Server
from tests.web.test_browser_client import browser as browser
from tests.web.test_playground import choose, open_page
from tests.web.test_playground import playing as playing
from tests.web.test_results import generate, open_first, png

RED = (255, 0, 0)


@pytest.fixture
def page(browser: Browser, playing: Server) -> Iterator[Page]:
    yield from open_page(browser, playing.url, viewport={"width": 1280, "height": 800})


@pytest.fixture
def mask(page: Page) -> Locator:
    return page.locator("dialog.mask")


def start(page: Page) -> None:
    """Upload an image of 96 x 80 for inpainting and open the brush."""
    choose(page, "test/inpaint")
    page.locator("[data-name=image_url] input[type=file]").set_input_files(
        {"name": "in.png", "mimeType": "image/png", "buffer": png()}
    )
    page.get_by_role("button", name="Draw mask").click()
    expect(page.locator("dialog.mask canvas")).to_be_focused()


def stroke(page: Page, *places: tuple[float, float]) -> None:
    """Drag the brush through these places, as fractions of the canvas."""
    box: Any = page.locator("dialog.mask canvas").bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=5)
    page.mouse.up()


def test_the_brush_follows_a_finger(browser: Browser, playing: Server) -> None:
    for page in open_page(browser, playing.url, viewport={"width": 390, "height": 844}, has_touch=True):
        start(page)
        box: Any = page.locator("dialog.mask canvas").bounding_box()
        devtools = page.context.new_cdp_session(page)
        for kind, share in (("touchStart", 0.3), ("touchMove", 0.5), ("touchMove", 0.7), ("touchEnd", None)):
            point = {"x": box["x"] + (share or 0) * box["width"], "y": box["y"] + 0.5 * box["height"]}
            devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point] if share else []})
        assert drawn_at(page, 0.5, 0.5)
        assert not drawn_at(page, 0.5, 0.1)


def drawn_at(page: Page, x: float, y: float) -> bool:
    """Return whether the mask is drawn at this place, a fraction of the canvas."""
    return bool(
        page.locator("dialog.mask canvas").evaluate(
            """(canvas, [x, y]) => canvas.getContext("2d")
            .getImageData(Math.floor(x * canvas.width), Math.floor(y * canvas.height), 1, 1).data[3] > 127""",
            [x, y],
        )
    )


def saved(page: Page) -> Image.Image:
    """Use the mask, wait for its upload, and return the file."""
    page.get_by_role("button", name="Use mask").click()
    expect(page.get_by_label("Mask URL")).not_to_have_value("")
    content = page.evaluate(
        """async (url) => {
            const bytes = new Uint8Array(await (await fetch(url)).arrayBuffer());
            return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
        }""",
        page.get_by_label("Mask URL").input_value(),
    )
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    image.load()
    return image


def test_a_drawn_mask_goes_where_mask_url_asks(page: Page, mask: Locator) -> None:
    """The mask has the size of the image, white where the brush was; the server repaints that part."""
    start(page)
    assert mask.locator(".stage img").bounding_box() == mask.locator("canvas").bounding_box()
    stroke(page, (0.25, 0.2), (0.25, 0.8))
    image = saved(page)
    assert (image.format, image.size) == ("PNG", (96, 80))
    grey = image.convert("L")
    assert (grey.getpixel((24, 40)), grey.getpixel((72, 40))) == (255, 0)
    page.get_by_label("Prompt").fill("red there")
    page.get_by_role("button", name="Run").click()
    colours = page.locator("#runs figure img").evaluate("""async (image) => {
        await image.decode();
        const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext("2d");
        canvas.drawImage(image, 0, 0);
        return [0.25, 0.75].map((x) => [...canvas.getImageData(x * image.naturalWidth, 40, 1, 1).data.slice(0, 3)]);
    }""")
    assert tuple(colours[0]) == pytest.approx(RED, abs=3)
    assert tuple(colours[1]) == pytest.approx((10, 200, 30), abs=3)


def test_the_brush_erases_inverts_undoes_and_has_a_size(page: Page, mask: Locator) -> None:
    start(page)
    stroke(page, (0.2, 0.5), (0.8, 0.5))
    assert (drawn_at(page, 0.5, 0.5), drawn_at(page, 0.5, 0.9)) == (True, False)
    page.get_by_role("button", name="Erase").click()
    stroke(page, (0.5, 0.3), (0.5, 0.7))
    assert (drawn_at(page, 0.5, 0.5), drawn_at(page, 0.25, 0.5)) == (False, True)
    page.get_by_role("button", name="Invert").click()
    assert (drawn_at(page, 0.5, 0.5), drawn_at(page, 0.25, 0.5), drawn_at(page, 0.5, 0.9)) == (True, False, True)
    for expected in ((False, True), (True, True)):
        page.get_by_role("button", name="Undo").click()
        assert (drawn_at(page, 0.5, 0.5), drawn_at(page, 0.25, 0.5)) == expected
    page.get_by_role("button", name="Erase").click()
    mask.get_by_label("Brush size").fill("40")
    stroke(page, (0.5, 0.75), (0.5, 0.76))
    assert drawn_at(page, 0.5, 0.95)
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Use mask").click()
    expect(mask.get_by_role("alert")).to_contain_text("The mask is empty")


def test_a_mask_is_drawn_by_keyboard(page: Page, mask: Locator) -> None:
    start(page)
    for key in ("Space", "ArrowRight", "ArrowRight", "ArrowRight", "Space", "ArrowDown"):
        page.keyboard.press(key)
    expect(mask.locator(".announcement")).to_have_text("The brush is lifted.")
    assert (drawn_at(page, 0.5, 0.5), drawn_at(page, 0.55, 0.5), drawn_at(page, 0.2, 0.5)) == (True, True, False)
    page.keyboard.press("Control+z")
    assert not drawn_at(page, 0.5, 0.5)
    size = mask.get_by_label("Brush size")
    sizes = [float(size.input_value())]
    for key in ("]", "["):
        page.keyboard.press(key)
        sizes.append(float(size.input_value()))
    assert sizes[0] < sizes[1] > sizes[2]
    page.keyboard.press("i")
    assert drawn_at(page, 0.2, 0.5)
    page.keyboard.press("e")
    expect(mask.get_by_role("button", name="Erase")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("e")
    page.keyboard.press("i")
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    expect(mask).to_have_count(0)
    expect(page.get_by_label("Mask URL")).not_to_have_value("")


def test_an_earlier_mask_is_continued(page: Page, mask: Locator) -> None:
    start(page)
    stroke(page, (0.25, 0.5), (0.26, 0.5))
    saved(page)
    page.get_by_role("button", name="Draw mask").click()
    expect(mask.locator("canvas")).to_be_focused()
    assert (drawn_at(page, 0.25, 0.5), drawn_at(page, 0.75, 0.5)) == (True, False)
    page.keyboard.press("Escape")
    expect(mask).to_have_count(0)


def test_a_part_of_a_result_is_repainted(page: Page, mask: Locator) -> None:
    """One key in the lightbox opens the brush over the result, in the form of an endpoint that takes a mask."""
    generate(page, "a bowl")
    source = str(page.locator("#runs figure img").first.get_attribute("src"))
    open_first(page)
    page.keyboard.press("r")
    expect(mask.locator("canvas")).to_be_focused()
    stroke(page, (0.4, 0.4), (0.6, 0.6))
    page.get_by_role("button", name="Use mask").click()
    expect(page.get_by_label("Image URL")).to_have_value(source)
    expect(page.get_by_label("Mask URL")).not_to_have_value("")
    expect(page.get_by_label("Prompt")).to_be_focused()
    expect(page.locator("#announcement")).to_contain_text("The form of test/inpaint now has the mask. Describe")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#runs figure img")).to_have_count(2)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "Choose the image first"),
        ("https://example.com/a.png", "Upload the image"),
        # In the form of fal's own files.
        ("https://example.com/files/tiger/a.png", "Upload the image"),
    ],
)
def test_a_mask_needs_an_image_of_this_server(page: Page, url: str, problem: str) -> None:
    choose(page, "test/inpaint")
    page.get_by_label("Image URL").fill(url)
    page.get_by_role("button", name="Draw mask").click()
    expect(page.locator("[data-name=mask_url] .problem")).to_contain_text(problem)


def test_without_a_mask_nothing_is_announced(page: Page, mask: Locator) -> None:
    """After Escape in the brush, the form is that for a mask, and the focus is on the field for one."""
    generate(page, "a bowl")
    open_first(page)
    page.keyboard.press("r")
    expect(mask.locator("canvas")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_label("Mask URL")).to_be_focused()
    expect(page.locator("#announcement")).not_to_contain_text("mask")


def test_an_empty_size_is_that_of_the_image(page: Page, mask: Locator) -> None:
    start(page)
    stroke(page, (0.4, 0.4), (0.6, 0.6))
    page.get_by_role("button", name="Use mask").click()
    expect(page.get_by_label("Mask URL")).not_to_have_value("")
    for side in ("Width in pixels", "Height in pixels"):
        expect(page.get_by_label(side)).to_have_attribute("placeholder", "Auto")
        page.get_by_label(side).fill("96")
        page.get_by_label(side).fill("")
    with page.expect_request(lambda request: request.url.endswith("/queue/test/inpaint")) as sent:
        page.get_by_role("button", name="Run").click()
    body: Any = sent.value.post_data_json
    assert "image_size" not in body
