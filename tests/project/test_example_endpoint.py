"""The example endpoints of docs/adding-an-endpoint.md are discovered, and the one without weights serves requests."""

import io
import json
import re
from pathlib import Path

import httpx
import pytest
from PIL import Image
from pydantic import ValidationError

import models
from tests.support.server_process import ROOT, serving

PAGE = ROOT / "docs" / "adding-an-endpoint.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
ENDPOINTS = ("acme/flux/portraits", "acme/plain")


def write_examples(directory: Path, name: str) -> Path:
    """Write the examples into a directory of models. Python caches modules by name, so each test passes a new name."""
    for number, example in enumerate(EXAMPLES):
        (directory / f"{name}_{number}.py").write_text(example)
    return directory


def test_every_example_begins_with_its_endpoint() -> None:
    assert [example.removeprefix('"""').partition(":")[0] for example in EXAMPLES] == list(ENDPOINTS)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_endpoint_is_discovered_and_validates_a_prompt(tmp_path: Path, endpoint: str) -> None:
    found = models.discover(write_examples(tmp_path, f"found_{endpoint.rpartition('/')[2]}"))
    assert set(found) - set(models.discover()) == set(ENDPOINTS)
    model = found[endpoint]
    request = model.Input.model_validate({"prompt": "a red apple", "seed": 7})
    assert model.metadata(request, 7)["prompt"] == "a red apple"
    with pytest.raises(ValidationError, match="prompt"):
        model.Input.model_validate({"seed": 7})


def test_the_endpoint_without_weights_is_served(tmp_path: Path) -> None:
    directory = tmp_path / "models"
    directory.mkdir()
    write_examples(directory, "served")
    settings = {"models_dir": str(directory), "a1111": "true"}
    with serving(tmp_path / "data", "acme/plain=demo", **settings) as server:
        body = {"prompt": "a plain", "seed": 0xFF0000, "num_images": 2}
        answer = httpx.post(f"{server.url}/acme/plain", json=body, timeout=60).json()
        assert (answer["seed"], answer["prompt"]) == (0xFF0000, "a plain")
        for output, colour in zip(answer["images"], [(255, 0, 0), (255, 0, 1)], strict=True):
            with Image.open(io.BytesIO(httpx.get(output["url"]).content)) as image:
                assert (image.size, image.getpixel((0, 0))) == ((512, 512), colour)
        # AUTOMATIC1111's response has a number of steps, which this endpoint's input has not.
        answer = httpx.post(f"{server.url}/sdapi/v1/txt2img", json={"prompt": "a plain", "seed": 1}, timeout=60).json()
        assert json.loads(answer["info"])["infotexts"] == ["a plain\nSize: 512x512, Model: acme/plain, Seed: 1"]
