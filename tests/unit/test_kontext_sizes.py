"""The sizes of FLUX.1 Kontext [dev], and the operator's limits on them."""

import pytest
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from pydantic import ValidationError

from models.flux_kontext import FluxKontextDevInput
from models.image_size import Limits
from models.kontext_sizes import TRAINED_SIZES


def parse(mode: str, **limits: int) -> FluxKontextDevInput:
    body = {"prompt": "", "image_url": "https://example.com/a.png", "resolution_mode": mode}
    return FluxKontextDevInput.model_validate(body, context={"limits": Limits(**limits)})


def test_the_trained_sizes_are_diffusers_own() -> None:
    assert list(TRAINED_SIZES) == PREFERRED_KONTEXT_RESOLUTIONS


@pytest.mark.parametrize(
    ("mode", "limits", "refused"),
    [
        ("16:9", {"max_side": 1024}, "1392x752"),
        ("1:1", {"max_pixels": 1_000_000}, "1024x1024"),
        ("auto", {"max_side": 1567}, "672x1568"),
    ],
)
def test_a_mode_that_may_exceed_the_limits_is_refused(mode: str, limits: dict[str, int], refused: str) -> None:
    with pytest.raises(ValidationError, match=f"{mode} may give {refused} pixels") as caught:
        parse(mode, **limits)
    assert [error["loc"] for error in caught.value.errors()] == [("resolution_mode",)]
    parse("match_input", **limits)


def test_every_mode_is_accepted_with_the_default_limits() -> None:
    for mode in ("auto", "21:9", "9:21", "match_input"):
        assert parse(mode).resolution_mode == mode
