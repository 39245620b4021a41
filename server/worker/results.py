"""The outcome of a job with images: unsafe images are blacked out, then all images are encoded, stored and listed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pybase64
from PIL.Image import Image

from models.base import Model
from server.queue.jobs import Job, Outcome, Provenance
from server.storage.file_store import StoredFile
from server.worker import image_encoder
from server.worker.interfaces import FileSink


@dataclass(frozen=True)
class GeneratedImages:
    """The result of a finished task. `flags` says for each image whether it is unsafe.

    `seconds` is the time that the steps and the decoding of all images took together.
    """

    images: Sequence[Image]
    flags: Sequence[bool]
    seconds: float
    provenance: Provenance


class ResultBuilder:
    """A builder of outcomes, for jobs whose images are generated and checked."""

    def __init__(self, files: FileSink, *, embeds_parameters: bool) -> None:
        self._files = files
        self._embeds_parameters = embeds_parameters

    def outcome(self, job: Job, model: Model, request: Any, generated: GeneratedImages) -> Outcome:
        """Store the images and build the outcome. Raises DiskFull; no error leaves a file behind."""
        files: list[StoredFile] = []
        try:
            images = [
                self._image(job, model, request, generated, index, files) for index in range(len(generated.images))
            ]
            seconds = round(generated.seconds, 4)
            answer = model.build_output(request, images, generated.flags, {"inference": seconds})
            return Outcome(
                200,
                answer.model_dump_json(),
                inference_time=seconds,
                provenance=generated.provenance,
                files=tuple(files),
                billable_units=sum(math.ceil(each.width * each.height / 1e6) for each in generated.images),
            )
        except BaseException:
            self.discard(files)
            raise

    def discard(self, files: Sequence[StoredFile]) -> None:
        """Delete the files of a discarded outcome."""
        self._files.delete([file.name for file in files])

    def _image(
        self, job: Job, model: Model, request: Any, generated: GeneratedImages, index: int, files: list[StoredFile]
    ) -> dict[str, Any]:
        image = generated.images[index]
        if generated.flags[index]:
            image = image_encoder.black(image)
        content_type = image_encoder.CONTENT_TYPES[request.output_format]
        parameters = self._parameters(model, request, generated, index) if self._embeds_parameters else None
        content = image_encoder.encode(image, request.output_format, parameters)
        if request.sync_mode:
            url = f"data:{content_type};base64,{pybase64.b64encode(content).decode()}"
        else:
            extension = image_encoder.EXTENSIONS[request.output_format]
            files.append(self._files.create(content, extension, content_type, job.owner, job.lifecycle))
            url = f"{job.base_url}/files/{files[-1].name}"
        return {"url": url, "width": image.width, "height": image.height, "content_type": content_type}

    def _parameters(self, model: Model, request: Any, generated: GeneratedImages, index: int) -> Mapping[str, Any]:
        """Return the parameters to embed: only those that the image depends on, so no time, request id or host."""
        image = generated.images[index]
        return {
            **model.metadata(request, request.seed + index),
            "width": image.width,
            "height": image.height,
            **generated.provenance,
        }
