"""The server people write today: FastAPI, FluxPipeline and a lock. What ours is compared with under mixed load.

FLUX=FOLDER uvicorn bench.support.naive_server:app; with COST=SECONDS it sleeps so long for a TFLOP instead of painting.
"""

import io
import os
import threading
import time
from typing import Any

import torch
from diffusers import FluxPipeline
from fastapi import FastAPI, Response
from pydantic import BaseModel

from bench.support.cost_models.cost import seconds_of
from models.loading.devices import dtype_for

app = FastAPI()
lock = threading.Lock()
pipeline: Any = None
if "FLUX" in os.environ:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The type that ours runs in: elsewhere bfloat16 alone could make it fifty times slower.
    pipeline = FluxPipeline.from_pretrained(os.environ["FLUX"], dtype=dtype_for("auto", device))
    pipeline.to(device).set_progress_bar_config(disable=True)


class Wish(BaseModel):
    """The body."""

    prompt: str
    width: int
    height: int
    num_inference_steps: int


@app.post("/generate")
def generate(wish: Wish) -> Response:
    """A JPEG, when it is this request's turn."""
    with lock:
        if pipeline is None:
            time.sleep(seconds_of(wish.width, wish.height) * wish.num_inference_steps)
            return Response()
        image = pipeline(**wish.model_dump()).images[0]
    content = io.BytesIO()
    image.save(content, "JPEG")
    return Response(content.getvalue(), media_type="image/jpeg")
