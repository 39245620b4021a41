"""The names by which clients of other APIs find endpoints, and the endpoints that edit images with the same weights."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from models.base import Model, Weights
from models.loading.specs import DEFAULT_ENDPOINT
from server.errors import InvalidInput, UnknownModel

#: OpenAI's names of models that generate images. Names that start as these do stand for the default endpoint too.
OPENAI_NAMES = ("gpt-image-1", "gpt-image-1-mini", "dall-e-3", "dall-e-2")
_INLINE_PREFIXES = ("gpt-image", "chatgpt-image")
_OPENAI_PREFIXES = (*_INLINE_PREFIXES, "dall-e")
#: The fields of a request that generates an image from a prompt alone.
PROMPT = frozenset({"prompt"})


def is_openai_name(name: str) -> bool:
    """Return whether a model name is one of OpenAI's for images, including later versions of the known ones."""
    return name.startswith(_OPENAI_PREFIXES)


def is_inline_name(name: str) -> bool:
    """Return whether a model name is one of OpenAI's whose responses hold the images themselves by default."""
    return name.startswith(_INLINE_PREFIXES)


class ModelNames:
    """The served endpoints by name. Endpoints of one family with the same weights can stand in for each other."""

    def __init__(
        self, models: Mapping[str, Model], weights: Mapping[str, Weights | None], entries: Sequence[str] = ()
    ) -> None:
        """Store the served `models` and their `weights` by endpoint, and `entries` such as NAME=ENDPOINT.

        Raises ValueError if an entry names an endpoint that is not served.
        """
        self._models = models
        self._weights = weights
        self._endpoints = dict[str, str](entry.split("=", 1) for entry in entries)
        for name, endpoint in self._endpoints.items():
            if endpoint not in models:
                offered = ", ".join(sorted(models))
                raise ValueError(f"--openai-models {name}={endpoint}: {endpoint} is not served here; choose {offered}")

    @property
    def default(self) -> str:
        """The endpoint of requests without a model: fal-ai/flux/dev, or the first that generates from a prompt.

        "" if no endpoint does.
        """
        if DEFAULT_ENDPOINT in self._models:
            return DEFAULT_ENDPOINT
        return next((endpoint for endpoint, model in self._models.items() if accepts(model, PROMPT)), "")

    def names(self) -> list[str]:
        """List the endpoints, and the other names that stand for one of them."""
        aliases = dict.fromkeys((*self._endpoints, *(OPENAI_NAMES if self.default else ())))
        return [*self._models, *(name for name in aliases if name not in self._models)]

    def find(self, name: str | None) -> Model:
        """Return the model of this name, or the default one without a name. Raises UnknownModel."""
        name = name or self.default
        endpoint = self._endpoints.get(name, name)
        if endpoint not in self._models and is_openai_name(name):
            endpoint = self.default
        if endpoint not in self._models:
            offered = ", ".join(sorted(self._models))
            raise UnknownModel(f"The model {name!r} does not exist; this server offers: {offered}")
        return self._models[endpoint]

    def find_variant(self, model: Model, fields: Mapping[str, str]) -> Model:
        """Return the endpoint with the weights of `model` that suits a request with just these fields.

        `fields` maps each field to its name in the client's API. `model` itself comes first, then endpoints that are
        made for the same weights, and of these the nearest by id. Raises InvalidInput if no served endpoint suits; the
        error is that of the last field.
        """
        suitable = [
            each for each in self._models.values() if self._shares_weights(each, model) and accepts(each, fields.keys())
        ]
        if not suitable:
            *_, last = names = list(fields.values())
            message = (
                f"No endpoint with the weights of {model.endpoint} takes {' and '.join(names)} and nothing else; "
                "ask the operator to serve one, or name another model"
            )
            raise InvalidInput.of("feature_not_supported", ("body", last), message)

        # With one set of weights for all endpoints, such as the demo's, endpoints made for other weights suit too. Of
        # equally near ones, the one with the fewest fields suits best.
        def rank(each: Model) -> tuple[bool, int, int]:
            return each.weights != model.weights, _distance(each.endpoint, model.endpoint), len(each.Input.model_fields)

        return min(suitable, key=rank)

    def _shares_weights(self, one: Model, other: Model) -> bool:
        return one.family == other.family and self._weights.get(one.endpoint) == self._weights.get(other.endpoint)


def _distance(endpoint: str, wanted: str) -> int:
    """Return how far an endpoint is from the wanted one: 0 for itself, 1 below it, 2 in the same app, 3 elsewhere."""
    app = "/".join(wanted.split("/")[:2])
    starts = (f"{wanted}/", f"{app}/")
    return 0 if endpoint == wanted else next((n for n, start in enumerate(starts, 1) if endpoint.startswith(start)), 3)


def accepts(model: Model, fields: AbstractSet[str]) -> bool:
    """Return whether the model's Input has all of these fields, and requires no others.

    An endpoint that follows the edges or depths of an image does not edit it.
    """
    if getattr(model.Input, "image_role", "start") in ("canny", "depth"):
        return False
    known = model.Input.model_fields
    required = {name for name, field in known.items() if field.is_required()}
    return required <= fields <= known.keys()
