"""The playground with endpoints of fal: their forms, and how much a first visit loads."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.server_process import Server, serving
from tests.web.test_browser_client import browser as browser
from tests.web.test_playground import choose, open_page, run
from tests.web.test_playground_devices import bytes_of_a_visit

IMAGE = "https://images.example/a.png"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    endpoints = ("fal-ai/flux/dev", "fal-ai/flux-general", "fal-ai/flux-general/inpainting")
    with serving(tmp_path_factory.mktemp("demo"), *(f"{endpoint}=demo" for endpoint in endpoints)) as server:
        yield server.ready()


@pytest.fixture
def page(browser: Browser, demo: Server) -> Iterator[Page]:
    yield from open_page(browser, demo.url)


@pytest.mark.parametrize("endpoint", ["fal-ai/flux/dev", "fal-ai/flux-general"])
def test_first_visit_loads_little(browser: Browser, demo: Server, endpoint: str) -> None:
    assert sum(bytes_of_a_visit(browser, f"{demo.url}/#{endpoint}?{{}}").values()) <= 100_000


def test_long_names_of_endpoints_fit_into_the_viewer(page: Page) -> None:
    choose(page, "fal-ai/flux/dev")
    page.get_by_text("More settings").click()
    page.get_by_role("spinbutton", name="Number of inference steps").fill("1")
    expect(run(page, "a fish").locator("figure img")).to_be_visible()
    page.locator("a.open").click()
    aside = page.locator("dialog.lightbox aside")
    expect(aside.get_by_role("button", name="Compare")).to_be_visible()
    assert aside.evaluate("aside => aside.scrollWidth <= aside.clientWidth")


def test_descriptions_name_other_fields_by_their_labels(page: Page) -> None:
    choose(page, "fal-ai/flux-general/inpainting")
    expect(page.get_by_label("Mask URL")).to_have_accessible_description(re.compile("as for “Image URL”"))


def test_lists_within_lists(page: Page) -> None:
    """A control net union has a list of images, whose fields can be filled in, and to which an image can be sent."""
    choose(page, "fal-ai/flux-general")
    page.get_by_text("More settings").click()
    unions = page.locator("[data-name=controlnet_unions]")
    unions.get_by_role("button", name="Add").first.click()
    controls = unions.locator("[data-name=controls]")
    for mode in ("depth", "pose"):
        controls.get_by_role("button", name="Add").click()
        controls.get_by_label("Control mode").last.select_option(mode)
    controls.get_by_label("Control image URL").first.fill(IMAGE)
    ids = page.locator("#form [id]").evaluate_all("all => all.map((each) => each.id)")
    assert len(ids) == len(set(ids))
    labels = page.locator("#form label[for]").evaluate_all("all => all.map((each) => each.htmlFor)")
    assert set(labels) <= set(ids)
    page.get_by_role("tab", name="Code").click()
    code = page.locator("pre[data-language=curl]")
    for text in (IMAGE, '"control_mode": "depth"', '"control_mode": "pose"'):
        expect(code).to_contain_text(text)


def test_an_image_is_written_into_the_first_item_of_each_list(page: Page) -> None:
    choose(page, "fal-ai/flux-general")
    page.evaluate(
        """async (url) => {
        const form = await import("./static/form.js");
        const schema = form.schemaOf(await (await fetch(
            "api/openapi/queue/openapi.json?endpoint_id=fal-ai/flux-general"
        )).json());
        const [first, more] = [document.createElement("div"), document.createElement("div")];
        const fields = form.build(schema, { first, more }, () => null);
        form.writeImage(fields, "controlnet_unions.controls.control_image_url", url);
        form.writeImage(fields, "control_loras.control_image_url", url);
        window.written = form.read(fields);
    }""",
        IMAGE,
    )
    written = page.evaluate("window.written")
    assert written["controlnet_unions"][0]["controls"][0]["control_image_url"] == IMAGE
    assert written["control_loras"][0]["control_image_url"] == IMAGE
