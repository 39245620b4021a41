"""GPUs that are none, a thousand in one process: what is left of a cluster is the head."""

import json
import os
import queue
from collections.abc import Iterator

from models.base import EngineInfo, LoadProgress
from server.cluster import messages
from server.queue.jobs import Job, Outcome
from server.storage.file_store import StoredFile, generate_file_name


class NullRunner:
    """A runner without a process: each job that it takes has ended already."""

    node = "nowhere"
    content = os.urandom(150_000)

    def __init__(self) -> None:
        self._taken: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    def messages(self) -> Iterator[messages.Message]:
        """Ready, then one end after the other."""
        yield messages.RunnerState(LoadProgress(), True, {"null": EngineInfo()})
        while job := self._taken.get():
            for step in range(1, 29):
                yield messages.JobProgress(job.request_id, step, 28, None)
            name = generate_file_name("jpg")
            file = StoredFile(name, job.owner, len(self.content), "image/jpeg")
            body = json.dumps({"images": [{"url": f"{job.base_url}/files/{name}"}], "seed": 1})
            yield messages.JobFinished(job.request_id, Outcome(200, body, files=(file,)), {name: self.content})

    def send_job(self, job: Job, text: str) -> None:
        """It ends at once."""
        self._taken.put(job)

    def stop(self) -> None:
        """No more."""
        self._taken.put(None)

    kill = stop

    def crashed_jobs(self) -> list[str]:
        """Nobody is at fault."""
        return []


class NullRayCluster:
    """As many GPUs as anybody wants."""

    start_runner = NullRunner

    def connect(self) -> None:
        """Nobody is asked."""

    def num_gpus(self) -> int:
        """Without end."""
        return 1_000_000

    def close(self) -> None:
        """Nobody is told."""
