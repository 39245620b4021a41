"""The part of AUTOMATIC1111's web UI API that Open WebUI and other chat programs call, under /sdapi/v1.

A request runs as one of fal's. FLUX.1 has neither a negative prompt nor cfg_scale, so these fields are ignored.
"""

import base64
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json, to_json

from server.api import validation
from server.api.dependencies import get_services, parse_request_body
from server.api.model_names import PROMPT, accepts
from server.api.operations import json_body
from server.api.responses import FalJSONResponse, result_response
from server.api.schemas.a1111 import A1111Images, Checkpoint, ChosenOptions, Progress
from server.api.wait import response_when_done
from server.errors import InvalidInput, Unauthorized, UnauthorizedUser
from server.inputs.spool import SpooledBody
from server.net.bytes_in_flight import SMALL
from server.queue.jobs import Job, Mode, Outcome, State, Submission
from server.storage.file_store import disk_errors

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])

#: The places where AUTOMATIC1111 has the fields of endpoints.
_NAMES: dict[str | int, tuple[str | int, ...]] = {
    "image_size": (),
    "num_images": ("batch_size",),
    "num_inference_steps": ("steps",),
    "guidance_scale": ("distilled_cfg_scale",),
    "image_url": ("init_images", 0),
    "mask_url": ("mask",),
    "strength": ("denoising_strength",),
}
_DATA = b"data:image/png;base64,"
#: How many characters of an image are copied at a time.
_PART = 2**18


@dataclass
class _Session:
    """The state that AUTOMATIC1111 keeps for everyone, kept for each key: the chosen endpoint and the last job."""

    checkpoint: str | None = None
    job: Job | None = None


class Options(BaseModel):
    """The options that have a meaning here; all others are ignored."""

    sd_model_checkpoint: str | None = Field(None, max_length=255)


class TextToImage(BaseModel):
    """A request to generate images from a prompt. Fields without a meaning here are ignored."""

    model_config = ConfigDict(allow_inf_nan=False)

    prompt: str = ""
    width: int = 512
    height: int = 512
    batch_size: int = Field(1, ge=1, le=100)
    n_iter: int = Field(1, ge=1, le=100)
    steps: int | None = None
    #: The field in which Forge, a fork of AUTOMATIC1111, takes the guidance scale of FLUX.1.
    distilled_cfg_scale: float | None = None
    seed: int = -1
    override_settings: Options = Options()

    @property
    def fields(self) -> dict[str, Any]:
        """The request without its images, translated to an endpoint's fields. Null stands for a default."""
        return {
            "prompt": self.prompt,
            "image_size": {"width": self.width, "height": self.height},
            "num_images": self.batch_size * self.n_iter,
            "num_inference_steps": self.steps,
            "guidance_scale": self.distilled_cfg_scale,
            "seed": self.seed if self.seed >= 0 else None,
            "sync_mode": True,
            "output_format": "png",
        }

    @property
    def images(self) -> dict[str, str]:
        """The images, in base64 or as data URIs, by the endpoint's fields."""
        return {}


class ImageToImage(TextToImage):
    """A request to change an image, or to repaint the white part of its mask. Its width and height are ignored."""

    init_images: list[str] = Field(min_length=1, max_length=1)
    mask: str | None = None
    denoising_strength: float = 0.75

    @property
    def fields(self) -> dict[str, Any]:
        """The request without its images, translated to an endpoint's fields.

        The result has the size of the image: not every endpoint can change the size, and the others would stretch.
        """
        return {**super().fields, "image_size": None, "strength": self.denoising_strength}

    @property
    def images(self) -> dict[str, str]:
        """The images, in base64 or as data URIs, by the endpoint's fields."""
        return {"image_url": self.init_images[0], **({"mask_url": self.mask} if self.mask else {})}


@router.get("/options", summary="Get the chosen checkpoint", response_model=ChosenOptions)
async def options(request: Request) -> Response:
    """Return the endpoint that requests use, as AUTOMATIC1111's checkpoint."""
    owner = _authenticate(request)
    return FalJSONResponse({"sd_model_checkpoint": _checkpoint(request, owner), "samples_format": "png"})


@router.post("/options", summary="Choose the checkpoint", response_model=None, openapi_extra=json_body(Options))
async def set_options(request: Request) -> Response:
    """Choose the endpoint for the further requests of this key."""
    services, owner = get_services(request), _authenticate(request)
    async with services.in_flight.body(request, owner, SMALL) as body:
        wanted = validation.parse_body(Options, body).sd_model_checkpoint
    if wanted is not None:
        _session(request, owner).checkpoint = services.model_names.find(wanted).endpoint
    return FalJSONResponse(None)


@router.get("/sd-models", summary="List the checkpoints", response_model=list[Checkpoint])
async def sd_models(request: Request) -> Response:
    """List the endpoints that generate images from a prompt, as AUTOMATIC1111's checkpoints."""
    _authenticate(request)
    served = get_services(request).models
    endpoints = [endpoint for endpoint, model in served.items() if accepts(model, PROMPT)]
    unknown = {"hash": None, "sha256": None, "config": None}
    return FalJSONResponse([{"title": name, "model_name": name, "filename": name, **unknown} for name in endpoints])


@router.get("/progress", summary="Get the progress of the last request", response_model=Progress)
async def progress(request: Request) -> Response:
    """Return how much of the key's last request is done, from 0 to 1; 0 if it has ended."""
    job = _session(request, _authenticate(request)).job
    is_running = job is not None and job.state != State.COMPLETED
    step, num_steps = (job.step, job.num_steps) if job and is_running else (0, 0)
    state = {"sampling_step": step, "sampling_steps": num_steps, "job_count": int(is_running)}
    return FalJSONResponse(
        {
            "progress": step / num_steps if num_steps else 0.0,
            "eta_relative": 0.0,
            "state": {"skipped": False, "interrupted": False, "job": "", "job_no": 0, **state},
            "current_image": None,
            "textinfo": None,
        }
    )


@router.post(
    "/txt2img",
    summary="Generate images from a prompt",
    response_model=A1111Images,
    openapi_extra=json_body(TextToImage),
)
async def txt2img(request: Request) -> Response:
    """Generate images from a prompt."""
    return await _generate(request, TextToImage)


@router.post("/img2img", summary="Change an image", response_model=A1111Images, openapi_extra=json_body(ImageToImage))
async def img2img(request: Request) -> Response:
    """Change an image, or repaint the white part of its mask."""
    return await _generate(request, ImageToImage)


async def _generate(request: Request, kind: type[TextToImage]) -> Response:
    services, owner = get_services(request), _authenticate(request)
    submission = await _parse(request, owner, kind)
    job = await services.executor.run(owner, services.queue.submit, submission)
    _session(request, owner).job = job
    return await response_when_done(request, job, partial(_response, submission))


async def _parse(request: Request, owner: str, kind: type[TextToImage]) -> Submission:
    """Parse a request into a submission. Raises as `submissions.parse_submission` does, and UnknownModel."""
    services = get_services(request)
    spool = SpooledBody(services.inputs.cache.temp_path)
    with disk_errors(), closing(spool), _own_names():
        # Images are base64 without the start of a data URI, so the body is not spooled as it arrives.
        async with services.in_flight.body(request, owner) as body:
            checkpoint, fields = await services.executor.run(owner, _translate, kind, body, spool)
            # The images are in files now. Many requests may wait here, so none may keep its body.
            del body
            wanted = services.model_names.find(checkpoint or _checkpoint(request, owner))
            model = services.model_names.find_variant(wanted, fields)
            return await parse_request_body(request, spool, model, owner, Mode.RUN, content_type="")


def _translate(kind: type[TextToImage], body: bytes, spool: SpooledBody) -> tuple[str | None, dict[str, str]]:
    """Parse the body, and write it as the fields of an endpoint into `spool`.

    Returns the checkpoint, and the fields that the endpoint must have, with AUTOMATIC1111's names for them. Takes about
    the memory of another body, because the images are copied part by part. Raises InvalidInput and OSError.
    """
    sent = validation.parse_body(kind, body)
    spool.write(to_json(sent.fields)[:-1])
    for field, image in sent.images.items():
        # Clients send images with or without the start of a data URI.
        spool.write(b', "%s": "%s' % (field.encode(), b"" if image[:5].lower() == "data:" else _DATA))
        for start in range(0, len(image), _PART):
            spool.write(to_json(image[start : start + _PART])[1:-1])
        spool.write(b'"')
    spool.write(b"}")
    spool.finish()
    needed = {"prompt": "prompt", **{field: str(_NAMES[field][0]) for field in sent.images}}
    return sent.override_settings.sd_model_checkpoint, needed


@contextmanager
def _own_names() -> Iterator[None]:
    """Give the fields in errors AUTOMATIC1111's names."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput([_own_entry(entry) for entry in error.detail]) from None


def _own_entry(entry: dict[str, Any]) -> dict[str, Any]:
    loc = [each for part in entry["loc"] for each in _NAMES.get(part, (part,))]
    # The number of images is the product of two fields. Pydantic's messages start with "Input should be".
    is_product = "num_images" in entry["loc"]
    message = entry["msg"].replace("Input", "batch_size times n_iter", 1) if is_product else entry["msg"]
    return {**entry, "loc": loc, "msg": message}


def _response(submission: Submission, outcome: Outcome) -> FalJSONResponse:
    """Build AUTOMATIC1111's response: images in base64, and their parameters as JSON in a string."""
    if outcome.status != 200:
        return result_response(outcome)
    sent, images = from_json(submission.input), from_json(outcome.body)["images"]
    seeds = [sent["seed"] + number for number in range(len(images))]
    size = {"width": images[0]["width"], "height": images[0]["height"]} if images else {}
    # An endpoint without this field decides on its number of steps itself.
    steps = sent.get("num_inference_steps")
    facts = {"Steps": steps, "Size": "x".join(map(str, size.values())), "Model": submission.endpoint}
    description = ", ".join(f"{name}: {value}" for name, value in facts.items() if value)
    info = {
        "prompt": sent["prompt"],
        "seed": sent["seed"],
        "all_seeds": seeds,
        **size,
        "steps": steps,
        "sd_model_name": submission.endpoint,
        "infotexts": [f"{sent['prompt']}\n{description}, Seed: {seed}" for seed in seeds],
    }
    content = [image["url"].partition(",")[2] for image in images]
    return FalJSONResponse({"images": content, "parameters": {}, "info": json.dumps(info)})


def _authenticate(request: Request) -> str:
    """Return the owner of the request's key. AUTOMATIC1111's clients send it as Basic USER:PASSWORD.

    A key in fal's form ID:SECRET is such a pair. Raises UnauthorizedUser.
    """
    header = request.headers.get("authorization", "")
    scheme, _, credentials = header.partition(" ")
    if scheme.lower() == "basic":
        with suppress(ValueError):
            header = f"Key {base64.b64decode(credentials, validate=True).decode()}"
    try:
        return get_services(request).keys.owner(header)
    except Unauthorized:
        raise UnauthorizedUser from None


def _session(request: Request, owner: str) -> _Session:
    sessions: dict[str, _Session] = request.app.state.a1111_sessions
    return sessions.setdefault(owner, _Session())


def _checkpoint(request: Request, owner: str) -> str:
    """Return the endpoint that the key has chosen, or else the default one."""
    return _session(request, owner).checkpoint or get_services(request).model_names.default
