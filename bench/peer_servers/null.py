"""A model that does nothing, for all peer servers. Its response has the same fields as a response of this server."""

from typing import Any

from pydantic import BaseModel, Field


class ImageSize(BaseModel):
    """The size of an image, in pixels."""

    width: int = Field(ge=64, le=2048)
    height: int = Field(ge=64, le=2048)


class GenerationRequest(BaseModel):
    """The body of a request."""

    prompt: str
    image_size: ImageSize
    num_inference_steps: int = Field(28, ge=1, le=50)
    seed: int = Field(0, ge=0)


def respond(request: GenerationRequest) -> dict[str, Any]:
    """Return the response, with the URL of an image that does not exist."""
    size = request.image_size
    url = "http://127.0.0.1:8000/files/0123456789abcdef0123456789abcdef.jpg"
    return {
        "images": [{"url": url, "width": size.width, "height": size.height, "content_type": "image/jpeg"}],
        "timings": {"inference": 0.0001},
        "seed": request.seed,
        "has_nsfw_concepts": [False],
        "prompt": request.prompt,
    }
