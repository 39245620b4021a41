"""Jobs that are claimed but not started: each waits until its weights are in memory."""

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
    """A list of claimed jobs in order of arrival, so that jobs whose weights are not loaded get a turn too."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, Model],
        queue: JobSource,
        engines: EnginePool,
        input_path: Callable[[str], Path],
    ) -> None:
        """Set up an empty list. `input_path` returns the path of an input file with the given name."""
        self._settings = settings
        self._models = models
        self._queue = queue
        self._engines = engines
        self._resolve_input = input_path
        self._waiting: deque[tuple[Job, str]] = deque()

    @property
    def jobs(self) -> list[Job]:
        """The waiting jobs."""
        return [job for job, _ in self._waiting]

    def claim(self, running: Sequence[RunningJob], num_ending: int) -> None:
        """Claim jobs up to --max-running; `num_ending` jobs are with the postprocessor. Raises DiskFull.

        Jobs of low priority do not count against the limit for normal priority, so they cannot block it.
        """
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
        """Yield each job that can run now, with its RunningJob, and each job that cannot run, with its outcome.

        Missing weights are loaded first. If the next job's weights would fit only in place of an engine `in_use`, all
        jobs wait. Raises DeviceLost.
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
            # After a load, start every job that needs these weights, so that weights are loaded as seldom as possible.
            alike = [each for each in self._waiting if self._engines.get_loaded(each[0].endpoint) is engine]
            busy.add(engine)
            for claimed in alike if is_new else alike[:1]:
                self._waiting.remove(claimed)
                yield claimed[0], self._start(*claimed, engine)

    def _engine_for(self, job: Job, in_use: Collection[Engine]) -> tuple[Engine | None, bool]:
        """Return a job's engine, and whether it was just loaded. The engine is None while those `in_use` leave no room.

        Raises NotFound if the endpoint is no longer served, and the errors of a load.
        """
        if job.endpoint not in self._engines:
            raise NotFound(f"{job.endpoint} is no longer served here")
        if engine := self._engines.get_loaded(job.endpoint):
            return engine, False
        return self._engines.load(job.endpoint, in_use), True

    def _start(self, job: Job, text: str, engine: Engine) -> RunningJob | Outcome:
        try:
            model = self._models[job.endpoint]
            # Validate without limits: an accepted request stays valid even if the settings have changed.
            request = model.Input.model_validate_json(text)
            inputs = {place: self._resolve_input(name) for place, name in job.input_files.items()}
            needs_safety_check = bool(request.enable_safety_checker or self._settings.enforce_safety_checker)
            return RunningJob(
                job, model, engine, request, engine.start(request, request.seed or 0, inputs), needs_safety_check
            )
        except DeviceLost:
            raise
        except Exception as error:
            return outcome_from_exception(error, job)
