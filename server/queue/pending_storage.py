"""What the requests that are not done need on the disk, counted by owner: their texts, and the files that they name."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection

from server.queue.jobs import Job


class PendingStorage:
    """Kept as requests come and go, so that a look costs the same however many there are.

    One thread at a time changes it; any may look.
    """

    def __init__(self, size_of: Callable[[str], int]) -> None:
        """`size_of` says how many bytes a file has."""
        self._size_of = size_of
        #: How many requests of an owner name a file.
        self._names: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._sizes: dict[str, int] = {}
        self._num_bytes: Counter[str] = Counter()

    def add(self, job: Job) -> None:
        """A request that is not done."""
        self._num_bytes[job.owner] += job.input_size
        for name in job.input_files.values():
            if not self._names[job.owner][name]:
                self._sizes.setdefault(name, self._size_of(name))
                self._num_bytes[job.owner] += self._sizes[name]
            self._names[job.owner][name] += 1

    def remove(self, job: Job) -> None:
        """One that was added, and is done."""
        self._num_bytes[job.owner] -= job.input_size
        for name in job.input_files.values():
            self._names[job.owner][name] -= 1
            if not self._names[job.owner][name]:
                del self._names[job.owner][name]
                self._num_bytes[job.owner] -= self._sizes[name]
                if not any(name in names for names in self._names.values()):
                    del self._sizes[name]

    def file_names(self) -> set[str]:
        """The files that anybody needs."""
        return {name for names in list(self._names.values()) for name in list(names)}

    def num_bytes(self, owner: str, more: Collection[str] = ()) -> int:
        """What an owner needs, with these files if they are not counted yet."""
        own = self._names.get(owner, Counter[str]())
        return self._num_bytes[owner] + sum(self._size_of(name) for name in more if name not in own)
