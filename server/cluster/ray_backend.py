"""Runners as Ray actors, and the head's handles to them. Ray is imported only if a cluster is used."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from server.cluster.messages import Message
from server.cluster.runner import Runner
from server.queue.jobs import Job
from server.settings import Settings
from server.worker import crash_recorder

log = logging.getLogger(__name__)

#: Seconds to wait for the crash report from the node of a dead runner; a dead node never answers.
CRASH_REPORT_TIMEOUT = 3.0
#: Maximum seconds to wait for a runner's reply. After that, a client that cancels a request gets its answer anyway. A
#: runner that has not said in time which input files it lacks counts as lost.
CALL_TIMEOUT = 2.0
#: Concurrency group of the short calls, which run while the long `work` call is active.
_CONTROL = "control"
#: Concurrency group of `stop`, which lasts as long as the grace period: cancels must not wait for it.
_STOP = "stop"


class RunnerLost(Exception):
    """Loss of a runner: it failed, or its process, its node or its GPU is gone."""


class RayLost(Exception):
    """Loss of Ray in this process: only a new process can connect again."""


class RayRunner(Runner):
    """A runner in a Ray actor process."""

    def about(self) -> Mapping[str, Any]:
        """Return what the base class returns, and the id and address of the node."""
        import ray

        return {
            **super().about(),
            "node_id": ray.get_runtime_context().get_node_id(),
            "node": ray.util.get_node_ip_address(),
        }

    def fetch(self, source: Any) -> bytes:
        """Fetch a file's content from Ray's object store."""
        import ray

        return bytes(ray.get(source))


class RunnerHandle:
    """The head's handle to one runner. It exists at once, even if Ray takes a while to find a GPU for the runner."""

    def __init__(self, settings: Settings, input_path: Callable[[str], Path]) -> None:
        import ray

        self._ray, self._input_path = ray, input_path
        self.node, self._about = "", dict[str, Any]()
        options = {"num_gpus": 1, "num_cpus": 0, "max_restarts": 0, "concurrency_groups": {_CONTROL: 1, _STOP: 1}}
        actor_class = ray.remote(**options)(RayRunner)
        # Secrets stay on the head: a runner neither checks keys nor signs webhooks.
        public = settings.model_copy(update={"keys": (), "operator_keys": (), "webhook_secret": ""})
        self._actor = actor_class.remote(public)

    def messages(self) -> Iterator[Message]:
        """Yield the runner's messages until it ends. Raises RunnerLost."""
        errors = self._ray.exceptions
        try:
            self._about = self._ray.get(self._control("about")())
            self.node = self._about["node"]
            for batch in self._actor.work.options(num_returns="streaming").remote():
                yield from self._ray.get(batch)
        except errors.RayTaskError as error:
            raise RunnerLost(str(error.cause)) from error
        except (errors.RayError, ValueError) as error:
            lines = str(error).strip().splitlines()
            raise RunnerLost(" ... ".join(dict.fromkeys((lines[0], lines[-1])))) from None

    def send_job(self, job: Job, text: str) -> None:
        """Send a job and the input files that the runner lacks. Raises RunnerLost, and OSError for a missing file."""
        names = sorted(set(job.input_files.values()))
        try:
            missing = self._ray.get(self._control("missing_inputs")(names), timeout=CALL_TIMEOUT) if names else []
            contents = {name: self._ray.put(self._input_path(name).read_bytes()) for name in missing}
            self._control("take_job")(job, text, contents)
        except self._ray.exceptions.RayError as error:
            raise RunnerLost(str(error)) from None

    def cancel(self, request_id: str) -> None:
        """Have the runner cancel a job before its next step; return when it confirms, or after CALL_TIMEOUT."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.get(self._control("cancel")(request_id), timeout=CALL_TIMEOUT)

    def preview(self, request_id: str) -> None:
        """Ask the runner for previews of a job."""
        self._control("preview")(request_id)

    def ack_crash(self) -> None:
        """Tell the runner that its crash is recorded, so that it can exit."""
        self._control("ack_crash")()

    def stop(self) -> None:
        """Ask the runner to finish its running jobs within the grace period and release the rest."""
        self._actor.stop.options(concurrency_group=_STOP).remote()

    def kill(self) -> None:
        """Kill the runner now, or withdraw its request for a GPU."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actor)

    def crashed_jobs(self) -> list[str]:
        """Return the ids of the requests that may have crashed the runner, and log the runner's stack trace.

        The list is empty if the runner did not crash, or if its node does not answer.
        """
        if not self._about:
            return []
        nearby = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(self._about["node_id"], soft=False)
        task = self._ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=nearby)(crash_recorder.load_crash)
        try:
            trace, request_ids = self._ray.get(task.remote(self._about["directory"]), timeout=CRASH_REPORT_TIMEOUT)
        except self._ray.exceptions.RayError:
            return []
        if trace:
            log.error("stack trace of the crashed runner:\n%s", trace)
        return list(request_ids)

    def _control(self, name: str) -> Callable[..., Any]:
        return partial(getattr(self._actor, name).options(concurrency_group=_CONTROL).remote)


class RayCluster:
    """The GPUs that Ray offers.

    The setting `ray` selects them: "local" means this machine, "auto" the cluster that this machine belongs to, and any
    other value is a cluster's address.
    """

    def __init__(self, settings: Settings, input_path: Callable[[str], Path]) -> None:
        self._settings, self._input_path = settings, input_path
        self._ray: Any = None

    def connect(self) -> None:
        """Start Ray or join its cluster. Raises RuntimeError if Ray is not installed or does not answer."""
        where = self._settings.ray
        if where == "local":
            # Despite its name, this variable makes Ray bind every port to loopback instead of all interfaces.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        try:
            import ray
            import ray.util.scheduling_strategies
        except ImportError:
            raise RuntimeError("--ray needs Ray; run pip install 'flux-server[ray]'") from None
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}
        try:
            if where == "local":
                number = None if _has_gpus() else self._settings.gpus or self._settings.max_gpus or 1
                ray.init("local", num_gpus=number, include_dashboard=False, **quiet)
            else:
                ray.init(where, **quiet)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise RuntimeError(f"--ray {where}: Ray cannot be started or reached: {error}") from None
        self._ray = ray
        address = ray.get_runtime_context().gcs_address
        log.info(
            "connected to Ray at %s, with %d GPUs; each runner starts when a GPU is free", address, self.num_gpus()
        )

    def start_runner(self) -> RunnerHandle:
        """Request a runner on the next free GPU; return its handle at once."""
        return RunnerHandle(self._settings, self._input_path)

    def num_gpus(self) -> int:
        """Return the number of GPUs in the cluster, busy or not. Raises RayLost if this process's node is gone."""
        nodes = {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}
        if self._ray.get_runtime_context().get_node_id() not in nodes:
            raise RayLost(
                "Ray on this machine has stopped. With --ray local, restart the server; otherwise, restart Ray first"
            )
        return int(sum(resources.get("GPU", 0) for resources in nodes.values()))

    def close(self) -> None:
        """Disconnect from Ray, and stop Ray if `connect` started it."""
        self._ray.shutdown()


def _has_gpus() -> bool:
    """Return whether this machine has NVIDIA GPUs, which Ray detects."""
    return any(Path("/dev").glob("nvidia[0-9]*"))
