"""Tests of the names by which clients of other APIs find endpoints, and of the endpoints that edit images."""

from typing import Any

import pytest

from models import discover
from server.api.model_names import ModelNames
from server.errors import InvalidInput, UnknownModel
from tests.support.fake_models import NullEngine, NullModel

KNOWN = discover(None)
#: The fields of requests, with OpenAI's names.
VARY = {"image_url": "image"}
EDIT = {"prompt": "prompt", **VARY}
REPAINT = {**EDIT, "mask_url": "mask"}


def names(weights: dict[str, str | None], *entries: str) -> ModelNames:
    """Serve these endpoints with these weights."""
    models: dict[str, Any] = {endpoint: KNOWN[endpoint] for endpoint in weights}
    return ModelNames(models, weights, entries)


DEV, SCHNELL, KREA, LORA = "fal-ai/flux/dev", "fal-ai/flux/schnell", "fal-ai/flux/krea", "fal-ai/flux-lora"
DEV_EDIT, LORA_EDIT, REDUX = f"{DEV}/image-to-image", f"{LORA}/image-to-image", f"{DEV}/redux"


@pytest.mark.parametrize(
    ("served", "default"),
    [((SCHNELL, DEV), DEV), ((DEV_EDIT, SCHNELL), SCHNELL), ((LORA, SCHNELL), LORA), ((DEV_EDIT,), "")],
)
def test_the_default_generates_from_a_prompt(served: tuple[str, ...], default: str) -> None:
    found = names(dict.fromkeys(served, "a"))
    assert found.default == default
    if default:
        assert found.find(None).endpoint == found.find("gpt-image-1").endpoint == default
        assert set(found.names()) == {*served, "gpt-image-1", "gpt-image-1-mini", "dall-e-3", "dall-e-2"}
    else:
        assert found.names() == list(served)
        for name in (None, "", "gpt-image-1"):
            with pytest.raises(UnknownModel):
                found.find(name)


def test_the_operators_names_come_first() -> None:
    found = names({DEV: "a", SCHNELL: "b"}, f"gpt-image-1={SCHNELL}", f"fast={SCHNELL}")
    assert [found.find(name).endpoint for name in ("gpt-image-1", "fast", "dall-e-3", DEV)] == [
        SCHNELL,
        SCHNELL,
        DEV,
        DEV,
    ]
    assert {"gpt-image-1", "fast", "dall-e-3"} <= set(found.names())
    with pytest.raises(UnknownModel, match="does not exist"):
        found.find("slow")


def test_a_name_for_an_endpoint_that_is_not_served() -> None:
    with pytest.raises(ValueError, match=f"--openai-models x={LORA}: {LORA} is not served here"):
        names({DEV: "a"}, f"x={LORA}")


def test_an_edit_uses_an_endpoint_with_the_same_weights() -> None:
    found = names({DEV: "a", LORA_EDIT: "a", DEV_EDIT: "a", SCHNELL: "b"})
    assert found.find_variant(KNOWN[DEV], EDIT).endpoint == DEV_EDIT
    assert found.find_variant(KNOWN[LORA_EDIT], EDIT).endpoint == LORA_EDIT
    assert names({DEV: "a", LORA_EDIT: "a"}).find_variant(KNOWN[DEV], EDIT).endpoint == LORA_EDIT
    with pytest.raises(InvalidInput):
        found.find_variant(KNOWN[SCHNELL], EDIT)
    with pytest.raises(InvalidInput):
        names({DEV: "a", LORA_EDIT: "b"}).find_variant(KNOWN[DEV], EDIT)


def test_endpoints_made_for_the_weights_come_first() -> None:
    """Prefer them where all endpoints share one set of weights, as with the demo."""

    class LoraEdit(NullModel):
        family = KNOWN[DEV].family
        Input = KNOWN[DEV_EDIT].Input

    class KreaEdit(LoraEdit):
        weights = KNOWN[KREA].weights

    class DevEdit(LoraEdit):
        weights = KNOWN[DEV].weights

    edits = [KreaEdit("fal-ai/flux/a", NullEngine), DevEdit("fal-ai/other/b", NullEngine)]
    models: dict[str, Any] = {model.endpoint: model for model in (*edits, KNOWN[DEV], KNOWN[KREA])}
    found = ModelNames(models, dict.fromkeys(models, "demo"))
    assert found.find_variant(KNOWN[DEV], EDIT).endpoint == "fal-ai/other/b"
    assert found.find_variant(KNOWN[KREA], EDIT).endpoint == "fal-ai/flux/a"


def test_only_an_endpoint_with_the_fields_is_found() -> None:
    found = names({DEV: "a", DEV_EDIT: "a", REDUX: "a"})
    assert found.find_variant(KNOWN[DEV], VARY).endpoint == REDUX
    assert found.find_variant(KNOWN[DEV], EDIT).endpoint == DEV_EDIT
    with pytest.raises(
        InvalidInput, match=r"weights of fal-ai/flux/dev takes prompt and image and mask and nothing else;"
    ) as raised:
        found.find_variant(KNOWN[DEV], REPAINT)
    assert raised.value.detail[0]["loc"] == ["body", "mask"]
