"""Parts of unfinished uploads: their number and sizes, kept in memory, and the file that they are joined into."""

import errno
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from server.storage.file_store import Lifecycle, counted_size

#: The name of a part that is being received. After a crash, such parts are left over.
_INCOMPLETE = re.compile(r"[0-9a-f]{16}\.part")

#: Error numbers of file systems without hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV)


@dataclass(frozen=True)
class Upload:
    """An upload that is not finished. `name` is the file's future name in the store."""

    upload_id: str
    name: str
    owner: str
    content_type: str
    file_name: str
    lifecycle: Lifecycle
    #: Seconds since 1970.
    created_at: float


@dataclass
class _Parts:
    upload: Upload
    sizes: dict[int, int] = field(default_factory=dict)
    num_bytes: int = 0


class PendingUploads:
    """The unfinished uploads and their totals, kept in memory, so that no check has to read all parts from the disk.

    Only one thread at a time may change the totals.
    """

    def __init__(self) -> None:
        self._uploads: dict[str, _Parts] = {}
        #: Totals by owner.
        self.num_uploads, self.num_parts, self.num_bytes = Counter[str](), Counter[str](), Counter[str]()

    def add(self, upload: Upload, sizes: Mapping[int, int] | None = None) -> None:
        """Add an upload, with the sizes of the parts that are already stored."""
        self._uploads[upload.upload_id] = _Parts(upload)
        self.num_uploads[upload.owner] += 1
        for number, size in (sizes or {}).items():
            self.put(upload.upload_id, number, size)

    def find(self, upload_id: str) -> Upload | None:
        """Return an unfinished upload, or None."""
        parts = self._uploads.get(upload_id)
        return parts.upload if parts else None

    def put(self, upload_id: str, number: int, size: int) -> None:
        """Count a stored part, in place of an earlier part with the same number."""
        parts = self._uploads[upload_id]
        self._take_out(parts, number)
        parts.sizes[number] = size
        parts.num_bytes += size
        self.num_parts[parts.upload.owner] += 1
        self.num_bytes[parts.upload.owner] += counted_size(size)

    def end(self, upload_id: str) -> None:
        """Remove an upload that has ended. Do nothing if it is already removed."""
        parts = self._uploads.pop(upload_id, None)
        if parts is None:
            return
        for number in list(parts.sizes):
            self._take_out(parts, number)
        self.num_uploads[parts.upload.owner] -= 1

    def parts(self, upload_id: str) -> list[int]:
        """Return the numbers of the stored parts, in ascending order; empty if there is no such upload."""
        return sorted(self._uploads[upload_id].sizes) if upload_id in self._uploads else []

    def size(self, upload_id: str, number: int | None = None) -> int:
        """Return the bytes of one part, or of all parts if `number` is None; 0 if nothing is stored."""
        parts = self._uploads.get(upload_id)
        if parts is None:
            return 0
        return parts.num_bytes if number is None else parts.sizes.get(number, 0)

    def has(self, upload_id: str, number: int) -> bool:
        """Return whether this part is stored."""
        return upload_id in self._uploads and number in self._uploads[upload_id].sizes

    def _take_out(self, parts: _Parts, number: int) -> None:
        size = parts.sizes.pop(number, None)
        if size is not None:
            parts.num_bytes -= size
            self.num_parts[parts.upload.owner] -= 1
            self.num_bytes[parts.upload.owner] -= counted_size(size)


class PartsInFlight:
    """Bytes of the parts that are being received, by upload and by owner."""

    def __init__(self) -> None:
        self._of_upload, self._of_owner = Counter[str](), Counter[str]()

    def add(self, upload: Upload, num_bytes: int) -> tuple[int, int]:
        """Add received bytes; return the totals of the upload and of its owner."""
        self._of_upload[upload.upload_id] += num_bytes
        self._of_owner[upload.owner] += num_bytes
        return self._of_upload[upload.upload_id], self._of_owner[upload.owner]

    def subtract(self, upload: Upload, num_bytes: int) -> None:
        """Subtract the bytes of a part that is no longer being received."""
        for counter, key in ((self._of_upload, upload.upload_id), (self._of_owner, upload.owner)):
            counter[key] -= num_bytes
            if not counter[key]:
                del counter[key]


def sizes_in(directory: Path) -> dict[int, int]:
    """Return the size in bytes of each part in an upload's directory, by number; empty if there is no directory.

    Deletes incomplete parts, so call it at startup only.
    """
    sizes: dict[int, int] = {}
    with suppress(FileNotFoundError):
        for entry in os.scandir(directory):
            with suppress(FileNotFoundError):
                if entry.name.isdecimal():
                    sizes[int(entry.name)] = entry.stat().st_size
                elif _INCOMPLETE.fullmatch(entry.name):
                    Path(entry).unlink()
    return sizes


def join(parts: Sequence[Path], whole: Path) -> int:
    """Join the parts into one file, durably; return its size in bytes. The parts stay. Raises OSError."""
    if len(parts) == 1:
        # Most files come in one part. If the file system has hard links, a link saves the copy.
        try:
            os.link(parts[0], whole)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _copy(parts, whole)
    else:
        _copy(parts, whole)
    with whole.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _copy(parts: Sequence[Path], whole: Path) -> None:
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file, 2**20)
