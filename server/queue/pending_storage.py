"""The disk space that unfinished requests need for their inputs and input files, counted per owner."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection

from server.queue.jobs import Job


class PendingStorage:
    """Running totals per owner: reading a total takes the same time for any number of requests.

    A file counts once per owner, however many requests of the owner use it.

    Only one thread at a time may change the totals; any thread may read them.
    """

    def __init__(self, size_of: Callable[[str], int]) -> None:
        """Start empty. `size_of` returns the size of the input file with this name, in bytes."""
        self._size_of = size_of
        #: For each owner, how many requests use each file.
        self._names: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._sizes: dict[str, int] = {}
        self._num_bytes: Counter[str] = Counter()

    def add(self, job: Job) -> None:
        """Count an unfinished request."""
        self._num_bytes[job.owner] += job.input_size
        for name in job.input_files.values():
            if not self._names[job.owner][name]:
                self._sizes.setdefault(name, self._size_of(name))
                self._num_bytes[job.owner] += self._sizes[name]
            self._names[job.owner][name] += 1

    def remove(self, job: Job) -> None:
        """Stop counting a request that was added and is now finished."""
        self._num_bytes[job.owner] -= job.input_size
        for name in job.input_files.values():
            self._names[job.owner][name] -= 1
            if not self._names[job.owner][name]:
                del self._names[job.owner][name]
                self._num_bytes[job.owner] -= self._sizes[name]
                if not any(name in names for names in self._names.values()):
                    del self._sizes[name]

    def file_names(self) -> set[str]:
        """Return the names of all input files that unfinished requests need."""
        return {name for names in list(self._names.values()) for name in list(names)}

    def num_bytes(self, owner: str, more: Collection[str] = ()) -> int:
        """Return the bytes that an owner's unfinished requests need together with the files named in `more`."""
        own = self._names.get(owner, Counter[str]())
        return self._num_bytes[owner] + sum(self._size_of(name) for name in more if name not in own)
