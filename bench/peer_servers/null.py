"""What all of them serve: a model that does nothing, its input, and an answer of the shape and size of ours."""

from typing import Any

from pydantic import BaseModel, Field


class ImageSize(BaseModel):
    """In pixels."""

    width: int = Field(ge=64, le=2048)
    height: int = Field(ge=64, le=2048)


class Wish(BaseModel):
    """The body."""

    prompt: str
    image_size: ImageSize
    num_inference_steps: int = Field(28, ge=1, le=50)
    seed: int = Field(0, ge=0)


def paint(wish: Wish) -> dict[str, Any]:
    """The answer to it, with the address of a picture that nobody made."""
    size = wish.image_size
    url = "http://127.0.0.1:8000/files/0123456789abcdef0123456789abcdef.jpg"
    return {
        "images": [{"url": url, "width": size.width, "height": size.height, "content_type": "image/jpeg"}],
        "timings": {"inference": 0.0001},
        "seed": wish.seed,
        "has_nsfw_concepts": [False],
        "prompt": wish.prompt,
    }
