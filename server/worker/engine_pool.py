"""The engines in memory: loaded when they are asked for; where memory lacks, the least recently used makes room."""

import dataclasses
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from models.base import Engine, EngineConfig, EngineInfo, LoadProgress, Model
from models.loading import pipeline, specs
from server.settings import Settings

log = logging.getLogger(__name__)

#: What endpoints have in common that share an engine.
Key = tuple[str, str]
#: Weights that could not be loaded are not tried again for so long: others would have to make room each time.
PAUSE_SECONDS = 120.0


def engine_configs(settings: Settings, weights_by_endpoint: Mapping[str, str | Path | None]) -> dict[str, EngineConfig]:
    """What each endpoint is set up with, by the weights it was given."""
    return {
        endpoint: EngineConfig(
            place,
            settings.safety_checker,
            device=settings.device,
            dtype=settings.dtype,
            memory=settings.memory,
            max_acceleration=settings.max_acceleration,
            is_eager=settings.eager,
            compile_cache=settings.data_dir / "compiled",
        )
        for endpoint, place in weights_by_endpoint.items()
    }


class EnginePool:
    """Endpoints of one family on the same weights share an engine. One thread loads and lets go."""

    def __init__(
        self,
        models: Mapping[str, Model],
        configs: Mapping[str, EngineConfig],
        max_loaded: int,
        report: Callable[[str, LoadProgress], None],
        on_idle: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_idle` is called from another thread when an engine that was in the way no longer is."""
        self._models = models
        self._configs = configs
        self._max_loaded = max_loaded
        self._report = report
        #: From the least to the most recently used.
        self._loaded: OrderedDict[Key, Engine] = OrderedDict()
        self._on_idle = on_idle
        self._clock = clock
        self._failures: dict[Key, tuple[float, OSError]] = {}
        self._warms_up = False
        #: The one that is being warmed up: its memory cannot be had.
        self._warming: Key | None = None
        #: One thread warms up at a time.
        self._warm_up_lock = threading.Lock()
        #: Over the loaded engines, and who is being warmed up.
        self._lock = threading.Lock()

    def __contains__(self, endpoint: str) -> bool:
        """Whether it is served, loaded or not."""
        return endpoint in self._configs

    def setup(self) -> None:
        """Load as many as there is room for, one at least. Raises what the first bad one raises."""
        for endpoint in self._configs:
            if self.get_loaded(endpoint) is None and (not self._loaded or self.has_room(endpoint)):
                self._load(endpoint)

    def get_loaded(self, endpoint: str) -> Engine | None:
        """The engine of an endpoint, if it is served and in memory; that counts as use."""
        if endpoint not in self:
            return None
        key = self._key(endpoint)
        if key in self._loaded:
            self._loaded.move_to_end(key)
        return self._loaded.get(key)

    def has_room(self, endpoint: str) -> bool:
        """Whether one more fits beside those that are loaded."""
        if self._max_loaded and len(self._loaded) >= self._max_loaded:
            return False
        return pipeline.has_room(self._configs[endpoint])

    def load(self, endpoint: str, in_use: Collection[Engine]) -> Engine | None:
        """Bring an endpoint's engine into memory; None while only those `in_use` could make room. Raises OSError."""
        self._raise_recent_failure(self._key(endpoint))
        while self._loaded and not self.has_room(endpoint):
            with self._lock:
                idle = [key for key, engine in self._loaded.items() if engine not in in_use and key != self._warming]
                if not idle:
                    return None
                log.info("%s: %s is let go to make room", endpoint, idle[0][1])
                engine = self._loaded.pop(idle[0])
            engine.close()
        return self._load(endpoint)

    def _raise_recent_failure(self, key: Key) -> None:
        failed_at, error = self._failures.get(key, (-PAUSE_SECONDS, None))
        if error and self._clock() < failed_at + PAUSE_SECONDS:
            raise error.with_traceback(None)

    def _load(self, endpoint: str) -> Engine:
        config = self._configs[endpoint]
        told = dataclasses.replace(config, report=lambda loading: self._report(endpoint, loading))
        try:
            engine = self._models[endpoint].setup(told)
        except OSError as error:
            self._failures[self._key(endpoint)] = (self._clock(), error)
            raise
        with self._lock:
            self._loaded[self._key(endpoint)] = engine
        if self._warms_up:
            self.start_warming_up()
        return engine

    def about(self) -> Mapping[str, EngineInfo]:
        """What there is to tell of each that is loaded, by its weights; called from any thread."""
        with self._lock:
            loaded = dict(self._loaded)
        names = {str(specs.DEMO): "demo"}
        return {names.get(where, where): engine.info() for (_, where), engine in loaded.items()}

    def start_warming_up(self) -> None:
        """Make further tiers ready on a thread of its own, of what is loaded now and of what will be."""
        self._warms_up = True
        threading.Thread(target=self._warm_up, args=(list(self._loaded),), name="warm-up", daemon=True).start()

    def _warm_up(self, keys: Collection[Key]) -> None:
        with self._warm_up_lock:
            for key in keys:
                while self._warm_up_one(key):
                    continue
            for engine in [self._loaded.get(key) for key in keys]:
                if engine:
                    engine.freeze_compilation()

    def _warm_up_one(self, key: Key) -> bool:
        """One tier; False when there is none left, or the engine was let go. Held here only while it works."""
        with self._lock:
            engine, self._warming = self._loaded.get(key), key
        try:
            return engine is not None and engine.warm_up()
        except Exception:
            log.exception("%s: a tier could not be made ready; requests for it get the next lower one", key[1])
            return True
        finally:
            with self._lock:
                self._warming = None
            self._on_idle()

    def _key(self, endpoint: str) -> Key:
        config = self._configs[endpoint]
        # Without weights there is nothing to share.
        return (self._models[endpoint].family, str(config.weights)) if config.weights else ("", endpoint)
