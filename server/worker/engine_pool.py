"""The engines in memory: loaded on demand; when memory is short, the least recently used one is evicted."""

import dataclasses
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping

from models.base import DeviceLost, Engine, EngineConfig, EngineInfo, ExtraWeights, LoadProgress, Model, Weights
from models.loading import pipeline, specs
from server.settings import Settings

log = logging.getLogger(__name__)

#: Family and weights: endpoints with equal keys share an engine.
Key = tuple[str, str]
#: Seconds before weights that failed to load are tried again, because each try may evict other engines.
PAUSE_SECONDS = 120.0


def engine_configs(
    settings: Settings, weights_by_endpoint: Mapping[str, Weights | None], models: Mapping[str, Model]
) -> dict[str, EngineConfig]:
    """Return the engine configuration of each endpoint, from the settings and the weights of all endpoints."""
    needed: dict[Weights | None, set[ExtraWeights]] = {place: set() for place in weights_by_endpoint.values()}
    for endpoint, place in weights_by_endpoint.items():
        if place:
            needed[place].update(specs.extra_weights_of(models[endpoint], place))
    return {
        endpoint: EngineConfig(
            place,
            settings.safety_checker,
            device=settings.device,
            dtype=settings.dtype,
            memory=settings.memory,
            quantize=settings.quantize,
            kernels_allow=settings.kernels_allow,
            max_acceleration=settings.max_acceleration,
            is_eager=settings.eager,
            compile_cache=settings.data_dir / "compiled",
            extra_weights=frozenset(needed[place]),
        )
        for endpoint, place in weights_by_endpoint.items()
    }


class EnginePool:
    """A pool of engines. Endpoints of one family with the same weights share an engine. One thread loads and evicts."""

    def __init__(
        self,
        models: Mapping[str, Model],
        configs: Mapping[str, EngineConfig],
        max_loaded: int,
        report: Callable[[str, LoadProgress], None],
        on_idle: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up an empty pool for at most `max_loaded` engines, or as many as fit if `max_loaded` is 0.

        `report` gets the endpoint and the progress of a load. The warm-up thread calls `on_idle` when an engine can
        be evicted again.
        """
        self._models = models
        self._configs = configs
        self._max_loaded = max_loaded
        self._report = report
        #: The engines in memory, least recently used first.
        self._loaded: OrderedDict[Key, Engine] = OrderedDict()
        self._on_idle = on_idle
        self._clock = clock
        self._failures: dict[Key, tuple[float, OSError]] = {}
        self._warms_up = False
        #: The engine that is being warmed up, which cannot be evicted.
        self._warming: Key | None = None
        #: Held while engines are warmed up, by one thread at a time.
        self._warm_up_lock = threading.Lock()
        #: Guards `_loaded` and `_warming`, which another thread uses too.
        self._lock = threading.Lock()

    def __contains__(self, endpoint: str) -> bool:
        """Return whether an endpoint is served, loaded or not."""
        return endpoint in self._configs

    def setup(self) -> None:
        """Load as many engines as fit, at least one. Raises the first error of a load."""
        for endpoint in self._configs:
            if self.get_loaded(endpoint) is None and (not self._loaded or self.has_room(endpoint)):
                self._load(endpoint)

    def get_loaded(self, endpoint: str) -> Engine | None:
        """Return an endpoint's engine and mark it as used; None if it is not in memory."""
        if endpoint not in self:
            return None
        key = self._key(endpoint)
        if key in self._loaded:
            self._loaded.move_to_end(key)
        return self._loaded.get(key)

    def has_room(self, endpoint: str) -> bool:
        """Return whether an endpoint's engine fits in addition to the loaded ones."""
        if self._max_loaded and len(self._loaded) >= self._max_loaded:
            return False
        return pipeline.has_room(self._configs[endpoint])

    def load(self, endpoint: str, in_use: Collection[Engine]) -> Engine | None:
        """Evict engines until an endpoint's engine fits, then load and return it. Raises OSError if the load fails.

        Return None if the engine would fit only in place of one that is `in_use` or being warmed up. For PAUSE_SECONDS
        after a failure, the same error is raised without a further try.
        """
        self._raise_recent_failure(self._key(endpoint))
        while self._loaded and not self.has_room(endpoint):
            with self._lock:
                idle = [key for key, engine in self._loaded.items() if engine not in in_use and key != self._warming]
                if not idle:
                    return None
                log.info("evicting the weights %s to make room for those of %s", idle[0][1], endpoint)
                engine = self._loaded.pop(idle[0])
            engine.close()
        return self._load(endpoint)

    def _raise_recent_failure(self, key: Key) -> None:
        failed_at, error = self._failures.get(key, (-PAUSE_SECONDS, None))
        if error and self._clock() < failed_at + PAUSE_SECONDS:
            raise error.with_traceback(None)

    def _load(self, endpoint: str) -> Engine:
        config = self._configs[endpoint]
        config = dataclasses.replace(config, report=lambda loading: self._report(endpoint, loading))
        failure = None
        try:
            engine = self._models[endpoint].setup(config)
        except OSError as error:
            # Without its traceback, whose frames may keep weights alive.
            failure = error.with_traceback(None)
        if failure:
            self._failures[self._key(endpoint)] = (self._clock(), failure)
            raise failure
        with self._lock:
            self._loaded[self._key(endpoint)] = engine
        if self._warms_up:
            self.start_warming_up()
        return engine

    def info(self) -> Mapping[str, EngineInfo]:
        """Return the status of each loaded engine, by its weights. May be called from any thread."""
        with self._lock:
            loaded = dict(self._loaded)
        weights = [config.weights for config in self._configs.values() if config.weights]
        names = {str(where): specs.name_of(where) for where in weights}
        return {names.get(where, where): engine.info() for (_, where), engine in loaded.items()}

    def start_warming_up(self) -> None:
        """Warm up the remaining tiers of all loaded engines on another thread, and those of engines loaded later."""
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
        """Warm up one tier; return False if none is left or the engine is gone. The engine is not evicted meanwhile."""
        with self._lock:
            engine, self._warming = self._loaded.get(key), key
        try:
            return engine is not None and engine.warm_up()
        except DeviceLost:
            # The next step reports it too, and ends the process.
            log.exception("the GPU was lost while a tier or the decoder of the weights %s was made ready", key[1])
            return False
        except Exception:
            log.exception(
                "a tier or the decoder of the weights %s could not be made ready, so requests use the next lower tier,"
                " or are decoded uncompiled; a restart of the server tries again",
                key[1],
            )
            return True
        finally:
            with self._lock:
                self._warming = None
            self._on_idle()

    def _key(self, endpoint: str) -> Key:
        config = self._configs[endpoint]
        # An engine without weights is not shared.
        return (self._models[endpoint].family, str(config.weights)) if config.weights else ("", endpoint)
