"""A runner as a Ray actor, and the head's link to it. Ray is imported by whoever starts a cluster."""

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

#: Seconds that the node of a dead runner has to tell how it died; a dead node tells nothing.
CRASH_REPORT_TIMEOUT = 3.0
#: Seconds that a cancel may take to reach a runner before its client is answered all the same.
CANCEL_TIMEOUT = 2.0
#: What the head calls beside the one call that lasts.
_CONTROL = "orders"
#: By itself, because it lasts as long as the grace, and cancels must come through meanwhile.
_STOP = "end"


class RunnerLost(Exception):
    """A runner is gone, with its process or its node; or its GPU is."""


class RayLost(Exception):
    """This process has no Ray any more: only a new process can have one."""


class RayRunner(Runner):
    """A runner that lives in a process of Ray's."""

    def about(self) -> Mapping[str, Any]:
        """Its node too."""
        import ray

        return {
            **super().about(),
            "node_id": ray.get_runtime_context().get_node_id(),
            "node": ray.util.get_node_ip_address(),
        }

    def fetch(self, source: Any) -> bytes:
        """From Ray's object store."""
        import ray

        return bytes(ray.get(source))


class RunnerHandle:
    """One runner, as the head sees it. Made at once, though Ray may look for a GPU for a while."""

    def __init__(self, settings: Settings, input_path: Callable[[str], Path]) -> None:
        import ray

        self._ray, self._input_path = ray, input_path
        self.node, self._about = "", dict[str, Any]()
        made = ray.remote(num_gpus=1, num_cpus=0, max_restarts=0, concurrency_groups={_CONTROL: 1, _STOP: 1})(RayRunner)
        # Nobody's secrets travel: a runner asks no client for a key and signs nothing.
        public = settings.model_copy(update={"keys": (), "operator_keys": (), "webhook_secret": ""})
        self._actor = made.remote(public)

    def messages(self) -> Iterator[Message]:
        """What the runner reports until it is over. Raises Lost."""
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
        """Give it a job, with those of its files that are not there yet. Raises Lost, and OSError for a file."""
        names = sorted(set(job.input_files.values()))
        try:
            lacking = self._ray.get(self._control("missing_inputs")(names), timeout=CANCEL_TIMEOUT) if names else []
            contents = {name: self._ray.put(self._input_path(name).read_bytes()) for name in lacking}
            self._control("take_job")(job, text, contents)
        except self._ray.exceptions.RayError as error:
            raise RunnerLost(str(error)) from None

    def cancel(self, request_id: str) -> None:
        """A job is to end before its next step; returns when the runner knows, or cannot know."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.get(self._control("cancel")(request_id), timeout=CANCEL_TIMEOUT)

    def preview(self, request_id: str) -> None:
        """Somebody wants to see a job's previews."""
        self._control("preview")(request_id)

    def ack_crash(self) -> None:
        """What was to be remembered before the process ends, is."""
        self._control("ack_crash")()

    def stop(self) -> None:
        """Finish what runs within the grace, give the rest back."""
        self._actor.stop.options(concurrency_group=_STOP).remote()

    def kill(self) -> None:
        """End it now, wherever it is, or stop looking for a GPU for it."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actor)

    def crashed_jobs(self) -> list[str]:
        """The requests a dead runner worked at, if it died of a fault of its own; its node says so."""
        if not self._about:
            return []
        nearby = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(self._about["node_id"], soft=False)
        task = self._ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=nearby)(crash_recorder.load_crash)
        try:
            trace, request_ids = self._ray.get(task.remote(self._about["folder"]), timeout=CRASH_REPORT_TIMEOUT)
        except self._ray.exceptions.RayError:
            return []
        if trace:
            log.error("the trace of the runner that died:\n%s", trace)
        return list(request_ids)

    def _control(self, name: str) -> Callable[..., Any]:
        return partial(getattr(self._actor, name).options(concurrency_group=_CONTROL).remote)


class RayCluster:
    """The GPUs that Ray has to give: of this machine ("local"), or of the cluster at an address.

    "auto" is the cluster that this machine is a node of.
    """

    def __init__(self, settings: Settings, input_path: Callable[[str], Path]) -> None:
        self._settings, self._input_path = settings, input_path
        self._ray: Any = None

    def connect(self) -> None:
        """Start Ray, or join it. Raises RuntimeError where it is not installed or does not answer."""
        where = self._settings.ray
        if where == "local":
            # Its name hides it: every port of Ray's is then bound to loopback, and not to all interfaces.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        try:
            import ray
            import ray.util.scheduling_strategies
        except ImportError:
            raise RuntimeError("--ray needs Ray: pip install 'flux-server[ray]'") from None
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}
        try:
            if where == "local":
                number = None if _has_gpus() else self._settings.gpus or self._settings.max_gpus or 1
                ray.init("local", num_gpus=number, include_dashboard=False, **quiet)
            else:
                ray.init(where, **quiet)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise RuntimeError(f"--ray {where}: {error}") from None
        self._ray = ray
        context = ray.get_runtime_context()
        log.info(
            "Ray is at %s, with %d GPUs; those that are taken are waited for", context.gcs_address, self.num_gpus()
        )

    def start_runner(self) -> RunnerHandle:
        """A runner on the next GPU that is free."""
        return RunnerHandle(self._settings, self._input_path)

    def num_gpus(self) -> int:
        """How many there are in all, busy ones too. Raises RayLost when this process's own node is gone."""
        nodes = {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}
        if self._ray.get_runtime_context().get_node_id() not in nodes:
            raise RayLost("Ray has died on this machine")
        return int(sum(resources.get("GPU", 0) for resources in nodes.values()))

    def close(self) -> None:
        """Leave; what was started here ends."""
        self._ray.shutdown()


def _has_gpus() -> bool:
    """Whether Ray will find some here by itself."""
    return any(Path("/dev").glob("nvidia[0-9]*"))
