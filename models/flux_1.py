"""fal-ai/flux-1: the endpoints of fal-ai/flux under newer ids, whose default acceleration is `regular`."""

import copy
import inspect
from typing import Any

from pydantic import create_model

from models import flux_dev, flux_krea, flux_schnell, flux_srpo
from models.base import Model
from models.flux_dev import FluxDevImageToImageInput, FluxImageToImageInput
from models.schema import AccelerationField

#: The defaults of fal-ai/flux-1, in the form of pydantic's field definitions.
_FIELDS: Any = {"acceleration": (AccelerationField, "regular")}


def _newer(model: Model) -> Model:
    """Return the endpoint of fal-ai/flux-1 for one of fal-ai/flux: Flux1DevInput for FluxDevInput, for example."""
    # The minimum of steps that fal documents for fal-ai/flux/dev/image-to-image holds for no other endpoint.
    base = FluxImageToImageInput if model.Input is FluxDevImageToImageInput else model.Input
    newer: Any = copy.copy(model)
    newer.endpoint = model.endpoint.replace("fal-ai/flux/", "fal-ai/flux-1/")
    newer.Input = create_model(
        model.Input.__name__.replace("Flux", "Flux1", 1),
        __base__=base,
        __doc__=f"{inspect.getdoc(model.Input)} The default acceleration is `regular`.",
        __module__=__name__,
        **_FIELDS,
    )
    result: Model = newer
    return result


MODELS: tuple[Model, ...] = tuple(
    _newer(model) for module in (flux_dev, flux_krea, flux_srpo, flux_schnell) for model in module.MODELS
)
