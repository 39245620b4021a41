"""fal-ai/flux-1: the endpoints of fal-ai/flux under newer ids, which accelerate by default."""

from models.base import Model
from models.flux_dev import (
    FluxDev,
    FluxDevImageToImage,
    FluxDevImageToImageInput,
    FluxDevInput,
    FluxDevRedux,
    FluxDevReduxInput,
)
from models.flux_krea import (
    FluxKrea,
    FluxKreaImageToImage,
    FluxKreaImageToImageInput,
    FluxKreaInput,
    FluxKreaRedux,
    FluxKreaReduxInput,
)
from models.flux_schnell import FluxSchnell, FluxSchnellInput, FluxSchnellRedux, FluxSchnellReduxInput
from models.flux_srpo import FluxSrpo, FluxSrpoImageToImage, FluxSrpoImageToImageInput, FluxSrpoInput
from models.schema import AccelerationField


class Flux1DevInput(FluxDevInput):
    """The input of fal-ai/flux/dev, with another default acceleration."""

    acceleration: AccelerationField = "regular"


class Flux1DevImageToImageInput(FluxDevImageToImageInput):
    """The input of fal-ai/flux/dev/image-to-image, with another default acceleration."""

    acceleration: AccelerationField = "regular"


class Flux1DevReduxInput(FluxDevReduxInput):
    """The input of fal-ai/flux/dev/redux, with another default acceleration."""

    acceleration: AccelerationField = "regular"


class Flux1KreaInput(FluxKreaInput):
    """The input of fal-ai/flux/krea, with another default acceleration."""

    acceleration: AccelerationField = "regular"


class Flux1KreaImageToImageInput(FluxKreaImageToImageInput):
    """The input of fal-ai/flux/krea/image-to-image, with another default acceleration."""

    acceleration: AccelerationField = "regular"


class Flux1KreaReduxInput(FluxKreaReduxInput):
    """The input of fal-ai/flux/krea/redux, with another default acceleration."""

    acceleration: AccelerationField = "regular"


class Flux1SrpoInput(FluxSrpoInput):
    """The input of fal-ai/flux/srpo, with another default acceleration."""

    acceleration: AccelerationField = "regular"


class Flux1SrpoImageToImageInput(FluxSrpoImageToImageInput):
    """The input of fal-ai/flux/srpo/image-to-image, with another default acceleration."""

    acceleration: AccelerationField = "regular"


class Flux1SchnellInput(FluxSchnellInput):
    """The input of fal-ai/flux/schnell, with another default acceleration."""

    acceleration: AccelerationField = "regular"


class Flux1SchnellReduxInput(FluxSchnellReduxInput):
    """The input of fal-ai/flux/schnell/redux, with another default acceleration."""

    acceleration: AccelerationField = "regular"


class Flux1Dev(FluxDev):
    """FLUX.1 [dev], a 12 billion parameter flow transformer that generates an image from a prompt."""

    endpoint = "fal-ai/flux-1/dev"
    Input = Flux1DevInput


class Flux1DevImageToImage(FluxDevImageToImage):
    """FLUX.1 [dev], starting from an image and changing it towards a prompt."""

    endpoint = "fal-ai/flux-1/dev/image-to-image"
    Input = Flux1DevImageToImageInput


class Flux1DevRedux(FluxDevRedux):
    """FLUX.1 [dev] with FLUX.1 Redux [dev], which generates variations of an image."""

    endpoint = "fal-ai/flux-1/dev/redux"
    Input = Flux1DevReduxInput


class Flux1Krea(FluxKrea):
    """FLUX.1 Krea [dev], tuned for images that look like natural photographs."""

    endpoint = "fal-ai/flux-1/krea"
    Input = Flux1KreaInput


class Flux1KreaImageToImage(FluxKreaImageToImage):
    """FLUX.1 Krea [dev], starting from an image and changing it towards a prompt."""

    endpoint = "fal-ai/flux-1/krea/image-to-image"
    Input = Flux1KreaImageToImageInput


class Flux1KreaRedux(FluxKreaRedux):
    """FLUX.1 Krea [dev] with FLUX.1 Redux [dev], which generates variations of an image."""

    endpoint = "fal-ai/flux-1/krea/redux"
    Input = Flux1KreaReduxInput


class Flux1Srpo(FluxSrpo):
    """FLUX.1 SRPO [dev], tuned with people's preferences for realistic images."""

    endpoint = "fal-ai/flux-1/srpo"
    Input = Flux1SrpoInput


class Flux1SrpoImageToImage(FluxSrpoImageToImage):
    """FLUX.1 SRPO [dev], starting from an image and changing it towards a prompt."""

    endpoint = "fal-ai/flux-1/srpo/image-to-image"
    Input = Flux1SrpoImageToImageInput


class Flux1Schnell(FluxSchnell):
    """FLUX.1 [schnell], a 12 billion parameter flow transformer that generates an image in one to four steps."""

    endpoint = "fal-ai/flux-1/schnell"
    Input = Flux1SchnellInput


class Flux1SchnellRedux(FluxSchnellRedux):
    """FLUX.1 [schnell] with FLUX.1 Redux [dev], which generates variations of an image in one to four steps."""

    endpoint = "fal-ai/flux-1/schnell/redux"
    Input = Flux1SchnellReduxInput


MODELS: tuple[Model, ...] = (
    Flux1Dev(),
    Flux1DevImageToImage(),
    Flux1DevRedux(),
    Flux1Krea(),
    Flux1KreaImageToImage(),
    Flux1KreaRedux(),
    Flux1Srpo(),
    Flux1SrpoImageToImage(),
    Flux1Schnell(),
    Flux1SchnellRedux(),
)
