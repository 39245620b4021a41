"""The engines in memory: loaded when they are asked for; where memory lacks, the least recently used makes room."""

import dataclasses
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping

from models import weights
from models.base import Engine, Loading, Model, Placement

log = logging.getLogger(__name__)

#: What endpoints have in common that share an engine.
Key = tuple[str, str]


class Engines:
    """Endpoints of one family on the same weights share an engine. One thread loads and lets go."""

    def __init__(
        self,
        models: Mapping[str, Model],
        placements: Mapping[str, Placement],
        max_loaded: int,
        report: Callable[[str, Loading], None],
    ) -> None:
        self._models = models
        self._placements = placements
        self._max_loaded = max_loaded
        self._report = report
        #: From the least to the most recently used.
        self._loaded: OrderedDict[Key, Engine] = OrderedDict()
        self._warms_up = False
        self._lock = threading.Lock()

    def __contains__(self, endpoint: str) -> bool:
        """Whether it is served, loaded or not."""
        return endpoint in self._placements

    def setup(self) -> None:
        """Load as many as there is room for, one at least. Raises what the first bad one raises."""
        for endpoint in self._placements:
            if self.at_hand(endpoint) is None and (not self._loaded or self.has_room(endpoint)):
                self._load(endpoint)

    def at_hand(self, endpoint: str) -> Engine | None:
        """The engine of an endpoint, if it is in memory; that counts as use."""
        key = self._key(endpoint)
        if key in self._loaded:
            self._loaded.move_to_end(key)
        return self._loaded.get(key)

    def has_room(self, endpoint: str) -> bool:
        """Whether one more fits beside those that are loaded."""
        if self._max_loaded and len(self._loaded) >= self._max_loaded:
            return False
        return weights.has_room(self._placements[endpoint])

    def load(self, endpoint: str, in_use: Collection[Engine]) -> Engine | None:
        """Bring an endpoint's engine into memory; None while only those `in_use` could make room. Raises OSError."""
        while self._loaded and not self.has_room(endpoint):
            idle = [key for key, engine in self._loaded.items() if engine not in in_use]
            if not idle:
                return None
            log.info("%s: %s is let go to make room", endpoint, idle[0][1])
            self._loaded.pop(idle[0]).close()
        return self._load(endpoint)

    def _load(self, endpoint: str) -> Engine:
        placement = self._placements[endpoint]
        told = dataclasses.replace(placement, report=lambda loading: self._report(endpoint, loading))
        engine = self._models[endpoint].setup(told)
        self._loaded[self._key(endpoint)] = engine
        if self._warms_up:
            self.start_warming_up()
        return engine

    def start_warming_up(self) -> None:
        """Make further tiers ready on a thread of its own, of what is loaded now and of what will be."""
        self._warms_up = True
        threading.Thread(target=self._warm_up, args=(dict(self._loaded),), name="warm-up", daemon=True).start()

    def _warm_up(self, engines: Mapping[Key, Engine]) -> None:
        with self._lock:
            for key, engine in engines.items():
                while _warm_up_one(key, engine):
                    continue
            for engine in engines.values():
                engine.settle()

    def _key(self, endpoint: str) -> Key:
        placement = self._placements[endpoint]
        # Without weights there is nothing to share.
        return (self._models[endpoint].family, str(placement.weights)) if placement.weights else ("", endpoint)


def _warm_up_one(key: Key, engine: Engine) -> bool:
    try:
        return engine.warm_up()
    except Exception:
        log.exception("%s: a tier could not be made ready; requests for it get the next lower one", key[1])
        return True
