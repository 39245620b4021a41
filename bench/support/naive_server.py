"""A naive server of FastAPI, FluxPipeline and a lock, for comparison with this project's server under mixed load.

Run FLUX=DIRECTORY uvicorn bench.support.naive_server:app. With COST=SECONDS instead of FLUX, the server generates
nothing and sleeps for this many seconds per TFLOP.
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
    # Use the dtype that this project's server chooses: on some CPUs, bfloat16 is fifty times slower than float32.
    pipeline = FluxPipeline.from_pretrained(os.environ["FLUX"], dtype=dtype_for("auto", device))
    pipeline.to(device).set_progress_bar_config(disable=True)


class GenerationRequest(BaseModel):
    """The body of a request."""

    prompt: str
    width: int
    height: int
    num_inference_steps: int


@app.post("/generate")
def generate(request: GenerationRequest) -> Response:
    """Wait for the lock, then generate a JPEG."""
    with lock:
        if pipeline is None:
            time.sleep(seconds_of(request.width, request.height) * request.num_inference_steps)
            return Response()
        length = pipeline.tokenizer_2.model_max_length
        image = pipeline(**request.model_dump(), max_sequence_length=length).images[0]
    content = io.BytesIO()
    image.save(content, "JPEG")
    return Response(content.getvalue(), media_type="image/jpeg")
