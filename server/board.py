"""Which GPU of many takes the next job: kept up to date change by change, so that a thousand cost no more than ten."""

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

from server.jobs import Job, Priority

#: Prompts that a runner is taken to have in its cache.
PROMPTS = 64
#: Runner hints that are remembered.
HINTS = 10_000


class Place(Protocol):
    """What the board has to know of a seat."""

    @property
    def number(self) -> int:
        """Its own."""

    @property
    def life(self) -> int:
        """Which runner this is, counted from the first."""

    @property
    def is_open(self) -> bool:
        """Whether it takes jobs."""

    @property
    def load(self) -> tuple[int, int]:
        """How many jobs it has, and how many of them are of low priority."""


@dataclass(frozen=True)
class Traits:
    """What a runner may have at hand already: what was compiled for a size, and what was read of a prompt."""

    size: str
    prompt: str

    @classmethod
    def of(cls, text: str) -> "Traits":
        """Of a request's input."""
        fields: dict[str, Any] = json.loads(text)
        return cls(json.dumps(fields.get("image_size")), str(fields.get("prompt")))


class Board:
    """Used by one thread. `limit` is how many requests of normal priority a GPU may have, and as many of low beside."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        #: Those that may take something, by how many jobs they have.
        self._by_load: dict[int, set[Place]] = {}
        self._load_of: dict[Place, int] = {}
        self._life_of: dict[Place, int] = {}
        self._by_size: dict[str, set[Place]] = {}
        self._by_prompt: dict[str, set[Place]] = {}
        self._sizes: dict[Place, set[str]] = {}
        self._prompts: dict[Place, OrderedDict[str, None]] = {}
        self._hints: OrderedDict[str, Place] = OrderedDict()

    @property
    def has_room(self) -> bool:
        """Whether any can take a job of normal priority."""
        return bool(self._load_of)

    @property
    def takes_low(self) -> bool:
        """Whether any can take one of low priority, which must not keep normal ones out."""
        return any(load < self._limit for load in self._by_load)

    def update(self, place: Place) -> None:
        """Something changed there."""
        if self._life_of.get(place) != place.life:
            self._forget(place)
            self._life_of[place] = place.life
        self._take_off(place)
        num_jobs, num_low = place.load
        if place.is_open and num_jobs - num_low < self._limit:
            self._load_of[place] = num_jobs
            self._by_load.setdefault(num_jobs, set()).add(place)

    def remove(self, place: Place) -> None:
        """It is no more."""
        self._forget(place)
        self._life_of.pop(place, None)
        self._take_off(place)

    def choose(self, job: Job, traits: Traits) -> Place:
        """Where the hint points, if there is room; else of those with least to do, the one that has most at hand.

        There must be room for it.
        """
        chosen = self._hinted(job) or self._best(traits)
        if job.runner_hint:
            self._hints[job.runner_hint] = chosen
            self._hints.move_to_end(job.runner_hint)
            if len(self._hints) > HINTS:
                self._hints.popitem(last=False)
        self._learn(chosen, traits)
        return chosen

    def _take_off(self, place: Place) -> None:
        load = self._load_of.pop(place, None)
        if load is not None:
            self._by_load[load].discard(place)
            if not self._by_load[load]:
                del self._by_load[load]

    def _hinted(self, job: Job) -> Place | None:
        place = self._hints.get(job.runner_hint or "")
        load = self._load_of.get(place) if place else None
        is_free = load is not None and (job.priority == Priority.NORMAL or load < self._limit)
        return place if is_free else None

    def _best(self, traits: Traits) -> Place:
        idlest = self._by_load[min(self._by_load)]
        sized, read = self._by_size.get(traits.size, set()), self._by_prompt.get(traits.prompt, set())
        found = idlest & sized & read or idlest & sized or idlest & read or idlest
        return min(found, key=lambda place: place.number)

    def _learn(self, place: Place, traits: Traits) -> None:
        self._sizes.setdefault(place, set()).add(traits.size)
        self._by_size.setdefault(traits.size, set()).add(place)
        prompts = self._prompts.setdefault(place, OrderedDict())
        prompts[traits.prompt] = None
        prompts.move_to_end(traits.prompt)
        self._by_prompt.setdefault(traits.prompt, set()).add(place)
        if len(prompts) > PROMPTS:
            self._unread(place, prompts.popitem(last=False)[0])

    def _forget(self, place: Place) -> None:
        for size in self._sizes.pop(place, ()):
            self._by_size[size].discard(place)
        for prompt in self._prompts.pop(place, ()):
            self._unread(place, prompt)

    def _unread(self, place: Place, prompt: str) -> None:
        self._by_prompt[prompt].discard(place)
        if not self._by_prompt[prompt]:
            del self._by_prompt[prompt]
