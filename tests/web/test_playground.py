"""The playground in a real browser: typed, run, watched, cancelled, kept."""

import base64
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from tests.clients.test_node_clients import node as node
from tests.clients.test_python_client import exports
from tests.support.hostile_images import encoded, noise
from tests.support.node import JS
from tests.support.server_process import Gate, Server, free_port, serving
from tests.web.test_browser_client import browser as browser


@pytest.fixture(scope="module")
def playing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The test models alone; one request is painted at a time."""
    settings = {"max_running": "1", "tls_port": str(free_port())}
    with serving(tmp_path_factory.mktemp("playing"), "test/null=demo", **settings) as server:
        yield server.ready()


@pytest.fixture
def page(browser: Browser, playing: Server) -> Iterator[Page]:
    yield from opened(browser, playing.url)


def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A page of a browser that was never here; whatever goes wrong on it, or leaves the origin, fails the test."""
    context = browser.new_context(**options)
    found = context.new_page()
    wrong: list[str] = []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    found.on("request", lambda request: wrong.append(request.url) if is_foreign(request.url, url) else None)
    found.goto(url)
    yield found
    context.close()
    assert wrong == []


def size_of(picture: Locator) -> Any:
    """Its own width and height, once it is there."""
    return picture.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")


def pixel_of(picture: Locator) -> Any:
    """The colour of its middle."""
    return picture.evaluate("""async (image) => {
        await image.decode();
        const canvas = new OffscreenCanvas(1, 1).getContext("2d");
        canvas.drawImage(image, 0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    }""")


def is_foreign(url: str, own: str) -> bool:
    return urlsplit(url).scheme in ("http", "https") and urlsplit(url).netloc != urlsplit(own).netloc


def choose(page: Page, endpoint: str) -> None:
    """An endpoint, and wait for its form."""
    page.wait_for_selector("body[data-ready]")
    page.get_by_label("Endpoint").select_option(endpoint)
    page.wait_for_selector(f"body[data-ready='{endpoint}']")


def press(page: Page, prompt: str) -> None:
    """Type a prompt and press the button, whatever comes of it."""
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Run").click()


def run(page: Page, prompt: str) -> Any:
    """Type a prompt and press the button; the newest run."""
    press(page, prompt)
    newest = page.locator("#runs > li").first
    expect(newest.locator(".prompt")).to_have_text(prompt)
    return newest


def test_type_run_and_see(page: Page) -> None:
    choose(page, "test/null")
    shown = run(page, "a red apple")
    picture = shown.get_by_role("img", name="a red apple")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])") == [
        1024,
        768,
    ]
    expect(shown.locator(".state")).to_contain_text("seed")


def test_position_steps_and_cancel(page: Page, gate: Gate) -> None:
    choose(page, "test/gate")
    page.get_by_text("More settings").click()
    page.get_by_label("Num inference steps", exact=True).fill("3")
    running = run(page, str(gate.path))
    expect(running.locator(".state")).to_have_text("begun")
    choose(page, "test/null")
    waiting = run(page, "second")
    expect(waiting.locator(".state")).to_have_text("next in line")
    cancelled = run(page, "third")
    expect(cancelled.locator(".state")).to_have_text("waiting, 1 request ahead")
    cancelled.get_by_role("button", name="Cancel").click()
    expect(cancelled.locator(".state")).to_contain_text("cancelled")
    gate.let(2)
    behind = page.locator("#runs > li").nth(2)
    expect(behind.locator(".state")).to_have_text("step 2 of 3")
    expect(behind.locator(".preview")).to_be_visible()
    gate.open()
    expect(behind.locator("figure img")).to_be_visible()
    expect(page.locator("#runs > li").nth(1).locator("figure img")).to_be_visible()


def test_history_survives_a_reload_and_gives_the_same_picture(page: Page) -> None:
    choose(page, "test/null")
    first = run(page, "kept")
    source = first.locator("figure img").get_attribute("src")
    page.reload()
    again = page.locator("#runs > li").first
    expect(again.locator("figure img")).to_have_attribute("src", str(source))
    again.get_by_role("button", name="Use these settings").click()
    expect(page.get_by_label("Prompt")).to_have_value("kept")
    # The seed was the server's own; with it the rerun gives the same picture, whose colour is the seed.
    rerun = run(page, "kept")
    expect(rerun.locator("figure img")).not_to_have_attribute("src", str(source))
    assert pixel_of(rerun.locator("figure img")) == pixel_of(again.locator("figure img"))
    rerun.get_by_role("button", name="Forget").click()
    again.get_by_role("button", name="Forget").click()
    expect(page.get_by_text("What you run appears here.")).to_be_visible()


def test_what_the_key_asked_for_elsewhere(browser: Browser, playing: Server, page: Page) -> None:
    """From another program, page by page, with what failed; what this browser ran is not shown twice."""
    choose(page, "test/null")
    run(page, "my own")
    with httpx.Client(base_url=playing.url, timeout=60, trust_env=False) as client:
        client.post("/test/raises", json={"prompt": "failed elsewhere"})
        for number in range(21):
            client.post("/test/null", json={"prompt": f"elsewhere {number}"}).raise_for_status()
    earlier = page.get_by_role("button", name="Show what this key asked for before")
    earlier.click()
    expect(page.locator("#runs > li")).to_have_count(21)
    expect(page.get_by_role("img", name="elsewhere 20")).to_be_visible()
    earlier.click()
    failed = page.locator("#runs > li", has_text="failed elsewhere")
    expect(failed.locator(".state")).to_have_text("Internal Server Error")
    expect(page.locator("#runs > li .prompt", has_text="my own")).to_have_count(1)


def test_the_seed_is_locked_and_rolled(page: Page) -> None:
    choose(page, "test/null")
    seed = page.get_by_label("Seed", exact=True)
    first = run(page, "any seed")
    expect(first.locator(".state")).to_contain_text("seed")
    page.get_by_role("button", name="Lock").click()
    expect(first.locator(".state")).to_contain_text(f"seed {seed.input_value()}")
    expect(page.get_by_role("button", name="Lock")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Lock").click()
    expect(seed).to_have_value("")
    page.get_by_role("button", name="Roll").click()
    expect(seed).to_have_value(re.compile(r"\d+"))


def test_a_picture_is_painted_over(page: Page) -> None:
    """Its address is put into the form of the endpoint that takes one."""
    choose(page, "test/null")
    shown = run(page, "once more")
    source = shown.locator("figure img").get_attribute("src")
    shown.get_by_role("button", name="Use as input").click()
    page.wait_for_selector("body[data-ready='test/copy']")
    expect(page.get_by_label("Image url")).to_have_value(str(source))
    expect(page.get_by_label("Prompt")).to_have_value("once more")
    assert size_of(run(page, "copied").locator("figure img")) == [1024, 768]


def drop(page: Page) -> None:
    """A picture of 96 x 80, on the field for one."""
    content = base64.b64encode(encoded(noise())).decode()
    page.locator(".field.image_url").evaluate(
        """(node, content) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            const given = new DataTransfer();
            given.items.add(new File([bytes], "in.png", { type: "image/png" }));
            node.dispatchEvent(new DragEvent("drop", { dataTransfer: given, bubbles: true, cancelable: true }));
        }""",
        content,
    )


def test_a_picture_is_dropped(page: Page) -> None:
    choose(page, "test/copy")
    drop(page)
    expect(page.get_by_label("Image url")).to_have_value(re.compile("/files/"))
    shown = run(page, "copy it")
    assert size_of(shown.locator("figure img")) == [96, 80]


@pytest.mark.parametrize("is_folded", [False, True])
def test_what_is_wrong_marks_its_field(page: Page, is_folded: bool) -> None:
    """Also one that is folded away: it is shown."""
    choose(page, "test/null")
    page.get_by_text("More settings").click()
    page.get_by_label("Guidance scale", exact=True).fill("99")
    if is_folded:
        page.get_by_text("More settings").click()
    page.get_by_role("button", name="Run").click()
    field = page.get_by_label("Guidance scale", exact=True)
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(page.locator(".field.guidance_scale .problem")).to_contain_text("less than or equal to 20")
    expect(field).to_be_focused()


def test_flagged_pictures_are_blurred(page: Page) -> None:
    choose(page, "test/unsafe")
    shown = run(page, "whatever")
    expect(shown.locator("figure img.flagged")).to_be_visible()
    expect(shown).to_contain_text("Flagged by the safety checker")
    shown.get_by_role("button", name="Show").click()
    expect(shown.locator("figure img.flagged")).to_have_count(0)


def test_failures_are_told(page: Page) -> None:
    choose(page, "test/raises")
    expect(run(page, "whatever").locator(".state")).to_have_text("Internal Server Error")


def test_a_wrong_key_is_asked_for_again(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path, "test/null=demo", keys="right") as server:
        for page in opened(browser, server.ready().url):
            choose(page, "test/null")
            press(page, "x")
            for key, problem in (("wrong", ""), ("right", "That key was refused.")):
                expect(page.locator("#ask-problem")).to_have_text(problem)
                page.get_by_label("Key", exact=True).fill(key)
                page.get_by_role("button", name="Use this key").click()
            expect(page.locator("#runs figure img")).to_be_visible()
            assert page.evaluate("JSON.stringify(localStorage)").find("right") == -1


def test_a_key_need_not_be_given(browser: Browser, tmp_path: Path) -> None:
    """Escape leaves the dialog; what was wanted is not done, and a key that was given before is kept."""
    with serving(tmp_path, "test/null=demo", keys="right,other") as server:
        for page in opened(browser, server.ready().url):
            choose(page, "test/null")
            press(page, "x")
            expect(page.locator("#ask")).to_be_visible()
            page.keyboard.press("Escape")
            expect(page.locator("#ask")).to_be_hidden()
            expect(page.locator("#problem")).to_contain_text("requires a valid key")
            page.get_by_role("button", name="Key", exact=True).click()
            page.get_by_label("Key", exact=True).fill("right")
            page.get_by_role("button", name="Use this key").click()
            page.goto(f"{server.url}/status")
            expect(page.locator("#ask-problem")).to_contain_text("is a client's")
            page.get_by_role("button", name="Not now").click()
            expect(page.locator("#state")).to_contain_text("is a client's")
            page.goto(server.url)
            choose(page, "test/null")
            expect(run(page, "still my key").locator("figure img")).to_be_visible()


def test_a_file_dropped_first_asks_for_the_key(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path, "test/null=demo", keys="right") as server:
        for page in opened(browser, server.ready().url):
            choose(page, "test/copy")
            drop(page)
            page.get_by_label("Key", exact=True).fill("right")
            page.get_by_role("button", name="Use this key").click()
            expect(page.get_by_label("Image url")).to_have_value(re.compile("/files/"))


def test_many_at_once_leave_room_to_cancel(page: Page, gate: Gate) -> None:
    """More than a browser has connections for: each is followed all the same, and the last can be cancelled."""
    choose(page, "test/gate")
    run(page, str(gate.path))
    choose(page, "test/null")
    for number in range(8):
        run(page, f"number {number}")
    last = page.locator("#runs > li").first
    expect(last.locator(".state")).to_have_text("waiting, 7 requests ahead")
    last.get_by_role("button", name="Cancel").click()
    expect(last.locator(".state")).to_contain_text("cancelled")
    gate.open()
    expect(page.locator("#runs figure img")).to_have_count(8)


def test_what_does_not_fit_into_the_browser_is_shown_all_the_same(page: Page) -> None:
    choose(page, "test/null")
    run(page, "first")
    page.evaluate("localStorage.setItem('filler', 'x'.repeat(5 * 2 ** 20 - 100 - JSON.stringify(localStorage).length))")
    expect(run(page, "the browser is full " * 20).locator("figure img")).to_be_visible()
    expect(run(page, "again").locator("figure img")).to_be_visible()
    assert page.locator("#problem").inner_text() == ""


def test_the_endpoint_chosen_last_wins(page: Page) -> None:
    """However late the description of the one before it comes."""
    choose(page, "test/null")
    held: list[Route] = []
    page.route("**/openapi.json?endpoint_id=test%2Fcopy", lambda route: held.append(route))
    page.get_by_label("Endpoint").select_option("test/copy")
    page.get_by_label("Endpoint").select_option("test/unsafe")
    page.wait_for_selector("body[data-ready='test/unsafe']")
    held[0].continue_()
    page.wait_for_load_state("networkidle")
    expect(page.get_by_label("Image url")).to_have_count(0)
    expect(page.get_by_label("Endpoint")).to_have_value("test/unsafe")


def test_what_is_forgotten_is_gone(page: Page, playing: Server, gate: Gate) -> None:
    """From the server too, with its picture; what still runs is stopped first."""
    choose(page, "test/null")
    shown = run(page, "a secret")
    source = str(shown.locator("figure img").get_attribute("src"))
    with page.expect_response(lambda answer: answer.request.method == "DELETE") as deleted:
        shown.get_by_role("button", name="Forget").click()
    assert deleted.value.status == 204
    assert httpx.get(source, trust_env=False).status_code == 404
    choose(page, "test/gate")
    running = run(page, str(gate.path))
    expect(running.locator(".state")).to_have_text("begun")
    with page.expect_response(lambda answer: answer.request.method == "DELETE") as deleted:
        running.get_by_role("button", name="Forget").click()
        gate.open()
    assert deleted.value.status == 204


def test_a_picture_that_is_gone_is_said_to_be(page: Page, playing: Server) -> None:
    """Painted elsewhere, so that this browser has it not itself."""
    answer = httpx.post(f"{playing.url}/test/null", json={"prompt": "for a while"}, trust_env=False).json()
    (playing.data_dir / "files" / answer["images"][0]["url"].rpartition("/")[2]).unlink()
    page.wait_for_selector("body[data-ready]")
    page.get_by_role("button", name="Show what this key asked for before").click()
    shown = page.locator("#runs > li", has_text="for a while").first
    expect(shown).to_contain_text("This picture is not kept any more")


def test_it_recovers_from_a_restart(browser: Browser, tmp_path: Path, gate: Gate) -> None:
    port = str(free_port())
    with serving(tmp_path, "test/null=demo", port=port) as server:
        pages = opened(browser, server.ready().url)
        page = next(pages)
        choose(page, "test/gate")
        shown = run(page, str(gate.path))
        expect(shown.locator(".state")).to_have_text("begun")
        server.kill()
    expect(shown.locator(".state")).to_contain_text("cannot be reached")
    gate.let(28)
    with serving(tmp_path, "test/null=demo", port=port) as server:
        server.ready()
        expect(shown.locator("figure img")).to_be_visible(timeout=30_000)
        assert next(pages, None) is None


@pytest.mark.parametrize("key", ["", "a-key"])
def test_the_code_runs(node: None, browser: Browser, tmp_path: Path, key: str) -> None:
    """Each program, pasted as it is, with a server that asks for a key and with one that does not."""
    with serving(tmp_path / "data", "test/null=demo", tls_port=str(free_port()), keys=key) as server:
        for page in opened(browser, server.ready().url):
            choose(page, "test/null")
            page.get_by_label("Prompt").fill("it's a \"test\" with $HOME and 'quotes'")
            page.get_by_role("button", name=re.compile("512.512")).click()
            page.get_by_label("Seed", exact=True).fill("5")
            page.get_by_role("tab", name="Code").click()
            names = ("curl", "Python", "JavaScript")
            programs = {name: page.locator(f"pre[data-language={name}]").inner_text() for name in names}
        environment = {"PATH": os.environ["PATH"], **exports(server), "FAL_KEY": key or "local"}
        (tmp_path / "pasted.mjs").write_text(programs["JavaScript"])
        (tmp_path / "node_modules").symlink_to(JS / "node_modules")
        commands = {
            "curl": ["bash", "-c", programs["curl"]],
            "Python": [sys.executable, "-c", programs["Python"]],
            "JavaScript": ["node", "pasted.mjs"],
        }
        for name, command in commands.items():
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, f"{name}: {done.stderr}"
            assert "/files/" in done.stdout, name


def test_the_operators_view(browser: Browser, playing: Server) -> None:
    httpx.post(f"{playing.url}/test/null", json={"prompt": "x"}, trust_env=False).raise_for_status()
    httpx.post(f"{playing.url}/test/raises", json={"prompt": "x"}, trust_env=False)
    for page in opened(browser, f"{playing.url}/status"):
        expect(page.locator("#state")).to_contain_text("ready")
        expect(page.locator("#endpoints")).to_contain_text("test/null")
        expect(page.locator("#failures")).to_contain_text("test/raises")
        expect(page.locator("#usage")).to_contain_text("everybody")
        expect(page.locator(".bars")).to_have_count(4)
        expect(page.locator(".bars").first.locator("span")).to_have_count(60)
        expect(page.get_by_role("img", name="Pictures a minute, the last hour: at most")).to_be_visible()
        expect(page.locator("#gpus")).to_contain_text("none at all")
        expect(page.locator("#steps")).to_contain_text("1024x768")


def test_the_api_in_swagger_ui(browser: Browser, playing: Server) -> None:
    """Every operation is listed, one is unfolded and tried; `opened` looks at what the page asks for, and of whom."""
    paths = httpx.get(f"{playing.url}/openapi.json", trust_env=False).json()["paths"]
    for page in opened(browser, f"{playing.url}/docs"):
        expect(page.locator(".opblock")).to_have_count(sum(len(operations) for operations in paths.values()))
        posted = page.locator(".opblock-post", has_text="/queue/test/null")
        posted.locator(".opblock-summary-control").click()
        expect(posted.get_by_text("Submit a request to the queue")).to_be_visible()
        expect(posted.locator(".highlight-code").first).to_contain_text("prompt")
        health = page.locator(".opblock").filter(has=page.locator("[data-path='/health']"))
        health.locator(".opblock-summary-control").click()
        health.get_by_role("button", name="Try it out").click()
        health.get_by_role("button", name="Execute").click()
        expect(health.locator(".live-responses-table tbody")).to_contain_text("alive")


@pytest.mark.parametrize("path", ["/", "/status", "/docs"])
def test_it_is_served_strictly(playing: Server, path: str) -> None:
    answer = httpx.get(f"{playing.url}{path}", trust_env=False)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert {"frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} <= set(policy.split("; "))
    assert answer.headers["x-content-type-options"] == "nosniff"
    # No script stands in the page itself, and each comes from this server.
    sources = re.findall(r"<script\b[^>]*>", answer.text)
    assert sources and all(re.search(r'src="(static|docs)/', source) for source in sources)
    assert httpx.head(f"{playing.url}{path}", trust_env=False).status_code == 200


def test_its_files_are_served_strictly(playing: Server) -> None:
    for name in ("static/app.js", "static/style.css", "static/icon.svg", "docs/swagger-ui-bundle.js"):
        answer = httpx.get(f"{playing.url}/{name}", trust_env=False)
        assert (answer.status_code, answer.headers["x-content-type-options"]) == (200, "nosniff")
    assert httpx.get(f"{playing.url}/static/../app.py", trust_env=False).status_code == 404
