"""Jobs that are claimed and not begun: each waits until its weights are in memory."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from models.base import DeviceLost, Engine, Model
from server.errors import ClientCancelled, NotFound
from server.queue.jobs import Job, Outcome, Priority
from server.settings import Settings
from server.worker.engine_pool import EnginePool
from server.worker.interfaces import JobSource
from server.worker.running_job import RunningJob, outcome_from_exception


class PendingJobs:
    """They begin in the order of their claims, so that who waits for other weights has its turn too."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, Model],
        queue: JobSource,
        engines: EnginePool,
        input_path: Callable[[str], Path],
    ) -> None:
        """`resolve_input` says where a file lies that a request brought along."""
        self._settings = settings
        self._models = models
        self._queue = queue
        self._engines = engines
        self._resolve_input = input_path
        self._waiting: deque[tuple[Job, str]] = deque()

    @property
    def jobs(self) -> list[Job]:
        """Those that wait."""
        return [job for job, _ in self._waiting]

    def claim(self, running: Sequence[RunningJob], num_ending: int) -> None:
        """Up to the limit; low priority must not keep normal out, so only those of normal count against normal."""
        while True:
            jobs = [*(each.job for each in running), *self.jobs]
            num_low = sum(job.priority == Priority.LOW for job in jobs)
            num_all = len(jobs) + num_ending
            if num_all - num_low >= self._settings.max_running:
                return
            limit = self._settings.max_running
            claimed = self._queue.claim(include_low_priority=num_all < limit, slots=limit)
            if claimed is None:
                return
            self._waiting.append(claimed)

    def start_ready(self, in_use: Collection[Engine]) -> Iterator[tuple[Job, RunningJob | Outcome]]:
        """Those that can be painted from now on, and those that cannot be painted at all. Raises DeviceLost.

        Weights are loaded here. While only engines `in_use` could make room for them, everybody waits.
        """
        for each in [each for each in self._waiting if each[0].is_cancelled]:
            self._waiting.remove(each)
            yield each[0], Outcome.from_error(ClientCancelled())
        busy = set(in_use)
        while self._waiting:
            job, _ = self._waiting[0]
            try:
                engine, is_new = self._engine_for(job, busy)
            except DeviceLost:
                raise
            except Exception as error:
                self._waiting.popleft()
                yield job, outcome_from_exception(error, job)
                continue
            if engine is None:
                return
            # All who waited for these weights: each switch is worth as much as it can be.
            alike = [each for each in self._waiting if self._engines.get_loaded(each[0].endpoint) is engine]
            busy.add(engine)
            for claimed in alike if is_new else alike[:1]:
                self._waiting.remove(claimed)
                yield claimed[0], self._start(*claimed, engine)

    def _engine_for(self, job: Job, in_use: Collection[Engine]) -> tuple[Engine | None, bool]:
        """The engine for a job, and whether it was loaded for it; none while others that run are in its way."""
        if job.endpoint not in self._engines:
            raise NotFound(f"{job.endpoint} is not served here any more")
        if engine := self._engines.get_loaded(job.endpoint):
            return engine, False
        return self._engines.load(job.endpoint, in_use), True

    def _start(self, job: Job, text: str, engine: Engine) -> RunningJob | Outcome:
        try:
            model = self._models[job.endpoint]
            # No limits: what was accepted stays accepted, whatever the settings are by now.
            request = model.Input.model_validate_json(text)
            inputs = {place: self._resolve_input(name) for place, name in job.input_files.items()}
            must_check = bool(request.enable_safety_checker or self._settings.enforce_safety_checker)
            return RunningJob(job, model, engine, request, engine.start(request, request.seed or 0, inputs), must_check)
        except DeviceLost:
            raise
        except Exception as error:
            return outcome_from_exception(error, job)
