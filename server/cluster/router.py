"""Which GPU of many takes the next job: kept up to date change by change, because there may be a thousand."""

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from server.queue.jobs import Job, Priority

#: Prompts, and sizes, that a runner is taken to have at hand.
KNOWN = 64
#: Runner hints that are remembered.
HINTS = 10_000


class Replica(Protocol):
    """What the board has to know of a seat."""

    @property
    def number(self) -> int:
        """Its own."""

    @property
    def incarnation(self) -> int:
        """Which runner this is, counted from the first."""

    @property
    def accepts_jobs(self) -> bool:
        """Whether it takes jobs."""

    @property
    def load(self) -> tuple[int, int]:
        """How many jobs it has, and how many of them are of low priority."""


P = TypeVar("P", bound=Replica)


@dataclass(frozen=True)
class CacheAffinity:
    """What a runner may have at hand already: what was compiled for a size, and what was read of a prompt."""

    size: str
    prompt: str

    @classmethod
    def of(cls, text: str) -> "CacheAffinity":
        """Of a request's input; of one that cannot be read, whoever takes it tells its client."""
        try:
            fields: dict[str, Any] = dict(json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return cls("", "")
        return cls(json.dumps(fields.get("image_size")), str(fields.get("prompt")))


class _AffinityIndex(Generic[P]):
    """Who has what at hand, the newest of each."""

    def __init__(self) -> None:
        self._of: dict[P, OrderedDict[str, None]] = {}
        self._who: dict[str, set[P]] = {}

    def holders(self, what: str) -> set[P]:
        """Those that have it."""
        return self._who.get(what, set())

    def add(self, place: P, what: str) -> None:
        """It has this from now on."""
        known = self._of.setdefault(place, OrderedDict())
        known[what] = None
        known.move_to_end(what)
        self._who.setdefault(what, set()).add(place)
        if len(known) > KNOWN:
            self._lose(place, known.popitem(last=False)[0])

    def remove(self, place: P) -> None:
        """It has nothing any more."""
        for what in self._of.pop(place, ()):
            self._lose(place, what)

    def _lose(self, place: P, what: str) -> None:
        self._who[what].discard(place)
        if not self._who[what]:
            del self._who[what]


class Router(Generic[P]):
    """Used by one thread. `limit` is how many requests of normal priority a GPU may have, and as many of low beside."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        #: Those that may take something, by how many jobs they have.
        self._by_load: dict[int, set[P]] = {}
        self._load_of: dict[P, int] = {}
        self._incarnation_of: dict[P, int] = {}
        self._sizes, self._prompts = _AffinityIndex[P](), _AffinityIndex[P]()
        self._hints: OrderedDict[str, P] = OrderedDict()

    @property
    def has_room(self) -> bool:
        """Whether any can take a job of normal priority."""
        return bool(self._load_of)

    @property
    def accepts_low_priority(self) -> bool:
        """Whether any can take one of low priority, which must not keep normal ones out."""
        return any(load < self._limit for load in self._by_load)

    @property
    def num_slots(self) -> int:
        """How many requests of one priority all GPUs together may have."""
        return self._limit * len(self._incarnation_of)

    def update(self, place: P) -> None:
        """Something changed there."""
        if self._incarnation_of.get(place) != place.incarnation:
            self._forget(place)
            self._incarnation_of[place] = place.incarnation
        self._remove_load(place)
        num_jobs, num_low = place.load
        if place.accepts_jobs and num_jobs - num_low < self._limit:
            self._load_of[place] = num_jobs
            self._by_load.setdefault(num_jobs, set()).add(place)

    def remove(self, place: P) -> None:
        """It is no more."""
        self._forget(place)
        self._incarnation_of.pop(place, None)
        self._remove_load(place)

    def route(self, job: Job, traits: CacheAffinity) -> P:
        """Where the hint points, if there is room; else of those with least to do, the one that has most at hand.

        There must be room for it.
        """
        chosen = self._hinted(job) or self._best(traits)
        if job.runner_hint:
            self._hints[job.runner_hint] = chosen
            self._hints.move_to_end(job.runner_hint)
            if len(self._hints) > HINTS:
                self._hints.popitem(last=False)
        self._sizes.add(chosen, traits.size)
        self._prompts.add(chosen, traits.prompt)
        return chosen

    def _remove_load(self, place: P) -> None:
        load = self._load_of.pop(place, None)
        if load is not None:
            self._by_load[load].discard(place)
            if not self._by_load[load]:
                del self._by_load[load]

    def _hinted(self, job: Job) -> P | None:
        place = self._hints.get(job.runner_hint or "")
        load = self._load_of.get(place) if place else None
        is_free = load is not None and (job.priority == Priority.NORMAL or load < self._limit)
        return place if is_free else None

    def _best(self, traits: CacheAffinity) -> P:
        idlest = self._by_load[min(self._by_load)]
        sized, read = self._sizes.holders(traits.size), self._prompts.holders(traits.prompt)
        found = idlest & sized & read or idlest & sized or idlest & read or idlest
        return min(found, key=lambda place: place.number)

    def _forget(self, place: P) -> None:
        self._sizes.remove(place)
        self._prompts.remove(place)
