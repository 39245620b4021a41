"""Fake GPUs of a cluster, in one process with a real head, so that only the head takes time."""

import json
import os
import queue
from collections.abc import Iterator

from models.base import EngineInfo, LoadProgress
from server.cluster import messages
from server.queue.jobs import Job, Outcome
from server.storage.file_store import StoredFile, generate_file_name


class NullRunner:
    """A runner without a process, which finishes each job at once."""

    node = "nowhere"
    content = os.urandom(150_000)

    def __init__(self) -> None:
        self._taken: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    def messages(self) -> Iterator[messages.Message]:
        """Yield the ready state, then the progress and the end of each job."""
        yield messages.RunnerState(LoadProgress(), True, {"null": EngineInfo()})
        while job := self._taken.get():
            for step in range(1, 29):
                yield messages.JobProgress(job.request_id, step, 28, None)
            name = generate_file_name("jpg")
            file = StoredFile(name, job.owner, len(self.content), "image/jpeg")
            body = json.dumps({"images": [{"url": f"{job.base_url}/files/{name}"}], "seed": 1})
            yield messages.JobFinished(job.request_id, Outcome(200, body, files=(file,)), {name: self.content})

    def send_job(self, job: Job, text: str) -> None:
        """Pass the job to `messages`, which finishes it at once."""
        self._taken.put(job)

    def stop(self) -> None:
        """End `messages`."""
        self._taken.put(None)

    kill = stop

    def crashed_jobs(self) -> list[str]:
        """Return no jobs: a fake runner never crashes."""
        return []


class NullRayCluster:
    """A stand-in for RayCluster without Ray, with more GPUs than any setting asks for."""

    start_runner = NullRunner

    def connect(self) -> None:
        """Do nothing: there is no cluster to connect to."""

    def num_gpus(self) -> int:
        """Return a number that no setting reaches."""
        return 1_000_000

    def close(self) -> None:
        """Do nothing: there is no connection to close."""
