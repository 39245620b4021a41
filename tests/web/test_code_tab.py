"""The playground's code tab: every program runs unchanged, and those for tests run as an application's CI runs them."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.clients.test_run_testing import run_testing
from tests.support.application_tests import Project
from tests.support.node import JS
from tests.support.python_client import env_variables
from tests.support.server_process import Server, free_port, serving
from tests.web.test_browser_client import browser as browser
from tests.web.test_playground import choose, open_page, run
from tests.web.test_playground import playing as playing

CLIENTS = ("curl", "Python", "JavaScript", "OpenAI, Python", "OpenAI, JavaScript")
FIXTURES = ("Test fixture, pytest", "Test fixture, Node")
PROMPT = "it's a \"test\" with $HOME and 'quotes'"


@pytest.fixture
def page(browser: Browser, playing: Server) -> Iterator[Page]:
    yield from open_page(browser, playing.url)


def programs_of(page: Page, endpoint: str = "test/null") -> dict[str, str]:
    """Fill in the form, open the code tab, and return its programs by name."""
    choose(page, endpoint)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Seed", exact=True).fill("5")
    page.get_by_role("tab", name="Code").click()
    page.wait_for_selector("#code pre")
    return {
        str(block.get_attribute("data-language")): str(block.text_content())
        for block in page.locator("#code pre").all()
    }


@pytest.mark.parametrize("key", ["", "a-key"])
def test_programs_run(node: None, browser: Browser, tmp_path: Path, key: str) -> None:
    """They run against a server that requires a key and one that does not."""
    with serving(tmp_path / "data", "test/null=demo", tls_port=str(free_port()), keys=key) as server:
        for page in open_page(browser, server.ready().url):
            choose(page, "test/null")
            page.get_by_role("button", name=re.compile("512.512")).click()
            programs = programs_of(page)
        assert tuple(programs) == (*CLIENTS, *FIXTURES)
        environment = {"PATH": os.environ["PATH"], **env_variables(server), "FAL_KEY": key or "local"}
        (tmp_path / "node_modules").symlink_to(JS / "node_modules")
        for name in CLIENTS:
            process = run_program(tmp_path, name, programs[name], environment)
            assert process.returncode == 0, f"{name}: {process.stderr}"
            assert "/files/" in process.stdout, name


def run_program(directory: Path, name: str, text: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run one of the programs for clients."""
    (directory / "sample.mjs").write_text(text)
    command = ["node", "sample.mjs"] if "JavaScript" in name else [sys.executable, "-c", text]
    command = ["bash", "-c", text] if name == "curl" else command
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60)


def test_the_pytest_fixture_runs(page: Page, tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write({"test_drawing.py": programs_of(page)["Test fixture, pytest"]})
    done = run_testing(project, "--", sys.executable, "-m", "pytest", "-q", "test_drawing.py")
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_the_node_fixture_runs(node: None, page: Page, tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write({"drawing.test.mjs": programs_of(page)["Test fixture, Node"]})
    (project.directory / "node_modules").symlink_to(JS / "node_modules")
    done = run_testing(project, "--", "node", "--test", "--test-reporter=tap", "drawing.test.mjs")
    assert re.search(r"^# pass 2$", done.stdout, re.MULTILINE), done.stdout + done.stderr


def test_openais_packages_are_left_out_where_they_do_not_apply(page: Page) -> None:
    """They would have to upload the image, which the form has as a URL."""
    assert tuple(programs_of(page, "test/copy")) == ("curl", "Python", "JavaScript", *FIXTURES)


def test_of_several_requests_the_programs_send_the_first(page: Page) -> None:
    choose(page, "test/null")
    page.get_by_role("tab", name="Code").click()
    about = page.get_by_text("requests. These programs send the first.")
    expect(about).to_be_hidden()
    page.get_by_label("Each line is a request").check()
    page.get_by_label("Repeat with").fill("2")
    page.get_by_label("Prompt", exact=True).fill("a fox\na bear")
    expect(about).to_have_text("The form sends 4 requests. These programs send the first.")
    code = page.locator("pre[data-language=curl]")
    expect(code).to_contain_text('"prompt": "a fox"')
    expect(code).not_to_contain_text("bear")


def test_the_chosen_language_is_remembered(page: Page) -> None:
    programs_of(page)
    page.get_by_role("tab", name="OpenAI, Python").click()
    expect(page.locator("#code pre:visible")).to_have_attribute("data-language", "OpenAI, Python")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#code pre:visible")).to_have_attribute("data-language", "OpenAI, JavaScript")
    page.get_by_label("Seed", exact=True).fill("6")
    expect(page.locator("#code pre:visible")).to_contain_text('"seed": 6')
    page.reload()
    page.wait_for_selector("body[data-ready]")
    page.get_by_role("tab", name="Code").click()
    expect(page.locator("#code pre:visible")).to_have_attribute("data-language", "OpenAI, JavaScript")


def test_the_code_of_an_image_leaves_the_form_as_it_is(page: Page) -> None:
    choose(page, "test/null")
    page.get_by_label("Seed", exact=True).fill("7")
    expect(run(page, "a boat").locator("figure img")).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill("a train")
    page.locator("#runs a.open").click()
    page.locator("dialog.lightbox").get_by_role("button", name="Show code").click()
    code = page.locator("#code")
    expect(code.locator("pre:visible")).to_contain_text("a boat")
    expect(code).to_contain_text("the chosen image")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a train")
    code.get_by_role("button", name="Show the form's").click()
    expect(code.locator("pre:visible")).to_contain_text("a train")
    expect(code).not_to_contain_text("the chosen image")


def test_a_change_of_the_form_shows_its_code_again(page: Page) -> None:
    choose(page, "test/null")
    expect(run(page, "a boat").locator("figure img")).to_be_visible()
    page.locator("#runs a.open").click()
    page.locator("dialog.lightbox").get_by_role("button", name="Show code").click()
    expect(page.locator("#code")).to_contain_text("the chosen image")
    page.get_by_label("Prompt", exact=True).fill("a train")
    expect(page.locator("#code pre:visible")).to_contain_text("a train")
    expect(page.locator("#code")).not_to_contain_text("the chosen image")
