"""The endpoints that docs/adding-an-endpoint.md shows are found, and the one without weights is served."""

import io
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


def written(folder: Path, name: str) -> Path:
    """A folder of models with these examples; modules are known by their names, so each test takes its own."""
    for number, example in enumerate(EXAMPLES):
        (folder / f"{name}_{number}.py").write_text(example)
    return folder


def test_every_example_begins_with_the_endpoint_that_it_is() -> None:
    assert [example.removeprefix('"""').partition(":")[0] for example in EXAMPLES] == list(ENDPOINTS)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_it_is_found_and_its_input_validates_a_prompt(tmp_path: Path, endpoint: str) -> None:
    found = models.discover(written(tmp_path, f"found_{endpoint.rpartition('/')[2]}"))
    assert set(found) - set(models.discover()) == set(ENDPOINTS)
    model = found[endpoint]
    request = model.Input.model_validate({"prompt": "a red apple", "seed": 7})
    assert model.metadata(request, 7)["prompt"] == "a red apple"
    with pytest.raises(ValidationError, match="prompt"):
        model.Input.model_validate({"seed": 7})


def test_the_one_without_weights_is_served(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    written(folder, "served")
    with serving(tmp_path / "data", "acme/plain=demo", models_dir=str(folder)) as server:
        body = {"prompt": "a plain", "seed": 0xFF0000, "num_images": 2}
        answer = httpx.post(f"{server.url}/acme/plain", json=body, timeout=60).json()
        assert (answer["seed"], answer["prompt"]) == (0xFF0000, "a plain")
        for image, colour in zip(answer["images"], [(255, 0, 0), (255, 0, 1)], strict=True):
            with Image.open(io.BytesIO(httpx.get(image["url"]).content)) as picture:
                assert (picture.size, picture.getpixel((0, 0))) == ((512, 512), colour)
