"""Routing of jobs to GPUs. The index is updated incrementally, because a cluster may have a thousand GPUs."""

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from server.queue.jobs import Job, Priority

#: How many of a runner's latest prompts the router assumes to be cached, and how many of the runner's latest sizes.
KNOWN = 64
#: Maximum runner hints that the router remembers.
HINTS = 10_000


class Replica(Protocol):
    """The properties of a GPU slot that the router reads."""

    @property
    def number(self) -> int:
        """The slot's number."""

    @property
    def incarnation(self) -> int:
        """The number of runners started so far, which identifies the current one."""

    @property
    def accepts_jobs(self) -> bool:
        """Whether the slot accepts new jobs."""

    @property
    def load(self) -> tuple[int, int]:
        """The number of jobs, and how many of them have low priority."""


R = TypeVar("R", bound=Replica)


@dataclass(frozen=True)
class CacheAffinity:
    """The parts of a request that a runner may have cached: code compiled for the size, and the encoded prompt."""

    size: str
    prompt: str

    @classmethod
    def of(cls, text: str) -> "CacheAffinity":
        """Return the affinity of a request's input as JSON; empty for malformed JSON, which the worker reports."""
        try:
            fields: dict[str, Any] = dict(json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return cls("", "")
        return cls(json.dumps(fields.get("image_size")), str(fields.get("prompt")))


class _AffinityIndex(Generic[R]):
    """An index of the keys, such as prompts, that each slot has cached: its newest KNOWN keys."""

    def __init__(self) -> None:
        self._keys_by_slot: dict[R, OrderedDict[str, None]] = {}
        self._slots_by_key: dict[str, set[R]] = {}

    def holders(self, key: str) -> set[R]:
        """Return the slots that have this key."""
        return self._slots_by_key.get(key, set())

    def add(self, slot: R, key: str) -> None:
        """Record that a slot has this key, as its newest one."""
        keys = self._keys_by_slot.setdefault(slot, OrderedDict())
        keys[key] = None
        keys.move_to_end(key)
        self._slots_by_key.setdefault(key, set()).add(slot)
        if len(keys) > KNOWN:
            self._discard(slot, keys.popitem(last=False)[0])

    def remove(self, slot: R) -> None:
        """Remove all keys of a slot."""
        for key in self._keys_by_slot.pop(slot, ()):
            self._discard(slot, key)

    def _discard(self, slot: R, key: str) -> None:
        self._slots_by_key[key].discard(slot)
        if not self._slots_by_key[key]:
            del self._slots_by_key[key]


class Router(Generic[R]):
    """A router that chooses a slot for each job; used by one thread.

    `limit` is how many normal-priority jobs a GPU may have. A GPU gets a low-priority job only while it has fewer than
    `limit` jobs in total.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        #: Slots with room, by their number of jobs.
        self._by_load: dict[int, set[R]] = {}
        self._load_of: dict[R, int] = {}
        self._incarnation_of: dict[R, int] = {}
        self._sizes, self._prompts = _AffinityIndex[R](), _AffinityIndex[R]()
        self._hints: OrderedDict[str, R] = OrderedDict()

    @property
    def has_room(self) -> bool:
        """Whether any slot has room for a normal-priority job."""
        return bool(self._load_of)

    @property
    def accepts_low_priority(self) -> bool:
        """Whether any slot has room for a low-priority job: fewer than `limit` jobs in total."""
        return any(load < self._limit for load in self._by_load)

    @property
    def num_slots(self) -> int:
        """The number of jobs of one priority that all GPUs together may have."""
        return self._limit * len(self._incarnation_of)

    def update(self, slot: R) -> None:
        """Update the index after a slot's runner or jobs changed."""
        if self._incarnation_of.get(slot) != slot.incarnation:
            self._clear_affinity(slot)
            self._incarnation_of[slot] = slot.incarnation
        self._remove_load(slot)
        num_jobs, num_low = slot.load
        if slot.accepts_jobs and num_jobs - num_low < self._limit:
            self._load_of[slot] = num_jobs
            self._by_load.setdefault(num_jobs, set()).add(slot)

    def remove(self, slot: R) -> None:
        """Remove a slot whose GPU was released."""
        self._clear_affinity(slot)
        self._incarnation_of.pop(slot, None)
        self._remove_load(slot)

    def route(self, job: Job, affinity: CacheAffinity) -> R:
        """Choose a slot for a job. At least one slot must have room.

        The slot of the last job with the same runner hint is chosen if it has room. Otherwise, one of the least loaded
        slots is chosen: one that has cached both size and prompt if there is one, else the size, else the prompt.
        """
        chosen = self._hinted(job) or self._best(affinity)
        if job.runner_hint:
            self._hints[job.runner_hint] = chosen
            self._hints.move_to_end(job.runner_hint)
            if len(self._hints) > HINTS:
                self._hints.popitem(last=False)
        self._sizes.add(chosen, affinity.size)
        self._prompts.add(chosen, affinity.prompt)
        return chosen

    def _remove_load(self, slot: R) -> None:
        load = self._load_of.pop(slot, None)
        if load is not None:
            self._by_load[load].discard(slot)
            if not self._by_load[load]:
                del self._by_load[load]

    def _hinted(self, job: Job) -> R | None:
        slot = self._hints.get(job.runner_hint or "")
        load = self._load_of.get(slot) if slot else None
        is_free = load is not None and (job.priority == Priority.NORMAL or load < self._limit)
        return slot if is_free else None

    def _best(self, affinity: CacheAffinity) -> R:
        least_loaded = self._by_load[min(self._by_load)]
        same_size, same_prompt = self._sizes.holders(affinity.size), self._prompts.holders(affinity.prompt)
        candidates = (
            least_loaded & same_size & same_prompt
            or least_loaded & same_size
            or least_loaded & same_prompt
            or least_loaded
        )
        return min(candidates, key=lambda slot: slot.number)

    def _clear_affinity(self, slot: R) -> None:
        self._sizes.remove(slot)
        self._prompts.remove(slot)
