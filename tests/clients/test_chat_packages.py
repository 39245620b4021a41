"""Tests of the packages by which chat programs generate images: the AI SDK, LiteLLM and LangChain's DALL-E wrapper."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.support.connect_clients import download_package
from tests.support.image_files import decode, encode
from tests.support.node import JS
from tests.support.server_process import ROOT, TEST_MODELS, Server, serving

BLUE, RED = (0, 0, 255), (255, 0, 0)
#: The packages of pip, with their versions.
LITELLM, LANGCHAIN = ("litellm", "1.110.2"), ("langchain-community", "0.4.2")


@pytest.fixture(scope="module")
def chat_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    names = "gpt-image-1=test/null,dall-e-3=test/null"
    directory = tmp_path_factory.mktemp("chat")
    with serving(directory, TEST_MODELS, openai_models=names, keys="id:secret") as running:
        yield running.ready()


@pytest.fixture(scope="module")
def arguments(chat_server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments of a program: the base URL, a blue image, and a mask to repaint its left half."""
    directory = tmp_path_factory.mktemp("images")
    mask = Image.new("RGBA", (160, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 80, 128))
    (directory / "image.png").write_bytes(encode(Image.new("RGB", (160, 128), BLUE)))
    (directory / "mask.png").write_bytes(encode(mask))
    return [f"{chat_server.url}/v1", str(directory / "image.png"), str(directory / "mask.png")]


def output_of(command: list[str], cwd: Path, environment: dict[str, str]) -> Any:
    """Run a program; return the JSON in the last line that it prints."""
    environment = {"PATH": os.environ["PATH"], **environment}
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def check_edit(content: str) -> None:
    """Check that the left half of an edited image is repainted, and the right half kept."""
    image = decode(content)
    assert (image.size, image.getpixel((9, 9)), image.getpixel((150, 9))) == ((160, 128), RED, BLUE)


@pytest.mark.usefixtures("node")
def test_the_ai_sdk(arguments: list[str]) -> None:
    output = output_of(["node", "ai_sdk.mjs", *arguments], JS, {})
    assert [decode(image["base64"]).size for image in output["generated"]] == [(128, 96)] * 2
    assert {image["mediaType"] for image in output["generated"]} == {"image/png"}
    assert [decode(image["base64"]).size for image in output["older"]] == [(128, 96)]
    (edited,) = output["edited"]
    check_edit(edited["base64"])
    assert output["error"]["status"] == 404
    assert "does not exist" in output["error"]["message"]


def python_output(package: tuple[str, str], call: str, arguments: list[str], home: Path) -> Any:
    """Run a call of chat_client_calls with this package; return its output."""
    environment = {
        "PYTHONPATH": os.pathsep.join([str(download_package(*package)), str(ROOT)]),
        "HOME": str(home),
        # Otherwise LiteLLM fetches a list of prices from the internet.
        "LITELLM_LOCAL_MODEL_COST_MAP": "true",
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.chat_client_calls", call, *arguments]
    return output_of(command, ROOT, environment)


# Each of these packages downloads a few hundred megabytes the first time.
@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_litellm(arguments: list[str], tmp_path: Path) -> None:
    output = python_output(LITELLM, "litellm", arguments, tmp_path)
    assert decode(output["newer"]).size == (128, 96)
    assert decode(httpx.get(output["older"], trust_env=False).content).size == (128, 96)
    check_edit(output["edited"])
    assert output["error"]["status"] == 404
    assert "does not exist" in output["error"]["message"]


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_langchains_dall_e_wrapper(arguments: list[str], tmp_path: Path) -> None:
    output = python_output(LANGCHAIN, "langchain", arguments, tmp_path)
    assert decode(httpx.get(output["url"], trust_env=False).content).size == (128, 96)
