"""From pictures to the answer a client gets: blacked out where unsafe, encoded, stored, listed."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from models.base import Model
from server.queue.jobs import Job, Outcome
from server.storage.file_store import StoredFile
from server.worker import image_encoder
from server.worker.interfaces import FileSink


@dataclass(frozen=True)
class GeneratedImages:
    """What a finished painting comes to; `flags` says of each picture whether it must not be shown."""

    images: Sequence[Image]
    flags: Sequence[bool]
    seconds: float
    acceleration: str
    dtype: str


class ResultBuilder:
    """Makes the outcome of a job whose pictures are painted and checked."""

    def __init__(self, files: FileSink, *, embeds_parameters: bool) -> None:
        self._files = files
        self._embeds_parameters = embeds_parameters

    def outcome(self, job: Job, model: Model, request: Any, painted: GeneratedImages) -> Outcome:
        """The answer, with its files on the disk. Raises DiskFull, leaving no file behind."""
        files: list[StoredFile] = []
        try:
            images = [self._image(job, model, request, painted, index, files) for index in range(len(painted.images))]
            seconds = round(painted.seconds, 4)
            answer = model.build_output(request, images, painted.flags, {"inference": seconds})
            return Outcome(
                200,
                answer.model_dump_json(),
                inference_time=seconds,
                acceleration=painted.acceleration,
                files=tuple(files),
                billable_units=sum(math.ceil(each.width * each.height / 1e6) for each in painted.images),
            )
        except BaseException:
            self.discard(files)
            raise

    def discard(self, files: Sequence[StoredFile]) -> None:
        """Delete the files of an outcome that nobody will see."""
        self._files.delete([file.name for file in files])

    def _image(
        self, job: Job, model: Model, request: Any, painted: GeneratedImages, index: int, files: list[StoredFile]
    ) -> dict[str, Any]:
        picture = painted.images[index]
        if painted.flags[index]:
            picture = image_encoder.black(picture)
        content_type = image_encoder.CONTENT_TYPES[request.output_format]
        parameters = self._parameters(model, request, painted, index) if self._embeds_parameters else None
        content = image_encoder.encode(picture, request.output_format, parameters)
        if request.sync_mode:
            url = f"data:{content_type};base64,{base64.b64encode(content).decode()}"
        else:
            ending = image_encoder.EXTENSIONS[request.output_format]
            files.append(self._files.create(content, ending, content_type, job.owner, job.lifecycle))
            url = f"{job.base_url}/files/{files[-1].name}"
        return {"url": url, "width": picture.width, "height": picture.height, "content_type": content_type}

    def _parameters(self, model: Model, request: Any, painted: GeneratedImages, index: int) -> Mapping[str, Any]:
        """Only what the bytes depend on: no time, no request id, no host."""
        picture = painted.images[index]
        return {
            **model.metadata(request, request.seed + index),
            "width": picture.width,
            "height": picture.height,
            "acceleration": painted.acceleration,
            "dtype": painted.dtype,
        }
