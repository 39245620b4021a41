"""Tests of masks: the same checks as of other input images, with errors that name the mask."""

import asyncio
import base64

import httpx
import pytest
from PIL import Image

from models.flux_lora import FluxLoraInpaintingInput
from models.schema import EXAMPLE_IMAGE
from server.errors import InvalidInput
from tests.support.components import Components
from tests.support.hostile_images import ACCEPTED, PNG, REFUSED, noise_image


def resolve(components: Components, mask_url: str) -> dict[str, str]:
    """Resolve the files of an inpainting request with this mask; return their names by field."""
    request = FluxLoraInpaintingInput(prompt="x", image_url=EXAMPLE_IMAGE, mask_url=mask_url)
    return asyncio.run(components.inputs.resolve(request, "me"))


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_masks_are_rejected(components: Components, name: str) -> None:
    content, error_type = REFUSED[name]
    with pytest.raises(InvalidInput) as rejected:
        resolve(components, data_uri(content))
    (entry,) = rejected.value.detail
    assert (entry["loc"], entry["type"]) == (["body", "mask_url"], error_type)


@pytest.mark.parametrize("name", ACCEPTED)
def test_odd_masks_are_accepted(components: Components, name: str) -> None:
    mask = resolve(components, data_uri(ACCEPTED[name]))["mask_url"]
    with Image.open(components.inputs.cache.path(mask)) as image:
        assert image.tobytes() == noise_image().tobytes()


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/", "http://10.0.0.1/a.png", "/etc/passwd", "file:///etc/passwd", "mask.png", "data:,"],
)
def test_masks_are_not_fetched_from_private_addresses_or_read_from_the_disk(components: Components, url: str) -> None:
    with pytest.raises(InvalidInput) as rejected:
        resolve(components, url)
    (entry,) = rejected.value.detail
    assert (entry["loc"], entry["type"]) == (["body", "mask_url"], "file_download_error")


def test_the_image_and_its_mask_may_be_one_file(components: Components) -> None:
    request = FluxLoraInpaintingInput(prompt="x", image_url=data_uri(PNG), mask_url=data_uri(PNG))
    names = asyncio.run(components.inputs.resolve(request, "me"))
    assert names["image_url"] == names["mask_url"]


@pytest.mark.parametrize("field", ["image_url", "mask_url"])
def test_the_image_and_the_mask_are_required(client: httpx.Client, field: str) -> None:
    body = {"prompt": "x", "image_url": EXAMPLE_IMAGE, "mask_url": EXAMPLE_IMAGE}
    del body[field]
    for endpoint in ("fal-ai/flux-lora/inpainting", "fal-ai/flux-krea-lora/inpainting"):
        (entry,) = client.post(f"/{endpoint}", json=body).json()["detail"]
        assert (entry["loc"], entry["type"]) == (["body", field], "missing")
