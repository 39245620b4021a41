"""Reading a body as it arrives: files and long base64 data go to temporary files, and the rest stays in memory."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

import pybase64

from server.errors import InvalidInput, InvalidInputFile

#: A piece of base64 data with more characters than this goes to a file.
MAX_IN_MEMORY = 64 * 2**10
#: The most bytes of a body that stay in memory: everything except the data in files. Real requests have much less.
MAX_TEXT = 2**20
#: How many characters of a piece that goes to a file also stay in the text, so that error messages can quote them.
_NUM_QUOTED = 1024
#: The start of base64 data. JSON's syntax has no semicolon, so this can only be inside a string.
_START = b";base64,"
#: Base64 data, in which JSON encoders may have escaped "/", "+" and "=". Possessive quantifiers, which Python 3.11.2
#: matches wrongly, are not needed: the pattern ends with the data, so a match never has to backtrack.
_ESCAPED_DATA = re.compile(rb"(?:[A-Za-z0-9+/=]+|\\/|\\u00(?:2[BbFf]|3[Dd]))*")
#: The beginning of an escape at the end of a part, whose remaining characters have not arrived yet.
_PARTIAL_ESCAPE = re.compile(rb"\\(?:u[0-9A-Fa-f]{0,3})?\Z")


class SpooledFile(Protocol):
    """Content of a body that is in a temporary file."""

    def link(self, path: Path, max_bytes: int) -> None:
        """Make the content a file at `path`.

        Raises InvalidInputFile for invalid content or if the client sent more than `max_bytes`, and OSError.
        """

    def close(self) -> None:
        """Close and delete the temporary file."""


def too_large(max_bytes: int) -> InvalidInputFile:
    """Build the error for a file with more than `max_bytes`."""
    return InvalidInputFile(
        "file_too_large", f"The file is larger than {max_bytes / 2**20:.0f} MiB", max_size=max_bytes
    )


def discard(file: BinaryIO, path: Path) -> None:
    """Close and delete a file that is not needed any more.

    Errors are ignored, so that a full disk, on which closing a file can fail, does not keep the other files.
    """
    with suppress(OSError):
        file.close()
    with suppress(OSError):
        path.unlink()


class Spool(ABC):
    """A request's body, whose files are in temporary files, and whose fields are in `text` as JSON.

    In `text`, a data URI that ends with `#` and a name stands for the file with this name. Base64 itself never contains
    `#`.
    """

    def __init__(self, temp_path: Callable[[], Path]) -> None:
        """Start empty. `temp_path` returns the path of a new temporary file."""
        self.text = b""
        self._temp_path = temp_path
        self._body_hash = hashlib.sha256()
        self._files: dict[str, SpooledFile] = {}

    @property
    def hash(self) -> str:
        """The SHA-256 of the whole body as it was received, in hexadecimal."""
        return self._body_hash.hexdigest()

    @abstractmethod
    def write(self, part: bytes) -> None:
        """Read the next part of the body. Raises InvalidInput if over MAX_TEXT bytes stay in memory, and OSError."""

    @abstractmethod
    def finish(self) -> None:
        """Read the end of the body, and set `text`. Raises as `write` does."""

    def find(self, url: str) -> SpooledFile | None:
        """Return the file that a data URI from `text` names; None if the URI contains all of its data."""
        return self._files.get(url.rpartition("#")[2])

    def is_in(self, text: str) -> bool:
        """Return whether this text contains the name of any file."""
        return any(name in text for name in self._files)

    def close(self) -> None:
        """Delete the temporary files."""
        for file in self._files.values():
            file.close()


class SpooledData:
    """A long piece of base64 data, decoded into a file as it arrives."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._rest = b""
        self._is_padded = False
        self._problem = ""

    def write(self, data: bytes) -> None:
        """Decode the next characters into the file. Raises OSError. For invalid base64, `link` raises an error."""
        self._hash.update(data)
        data = self._rest + data
        # Decode whole groups of four characters, which stand for three bytes.
        end = len(data) // 4 * 4
        if self._is_padded and data:
            self._problem = self._problem or "data follows its padding"
        self._decode(data[:end])
        self._is_padded |= data[:end].endswith(b"=")
        self._rest = data[end:]

    def finish(self) -> str:
        """Decode the last characters, close the file, and return the name of the data. Raises OSError.

        The name is the SHA-256 of the base64 characters, in hexadecimal.
        """
        self._decode(self._rest)
        self._file.close()
        return self._hash.hexdigest()

    def link(self, path: Path, max_bytes: int) -> None:
        """Hard-link the decoded file to `path`.

        Raises InvalidInputFile if the data is not base64 or has more than `max_bytes`, and OSError.
        """
        if self._problem:
            raise InvalidInputFile("file_download_error", f"The data URI is not base64: {self._problem}")
        if self._path.stat().st_size > max_bytes:
            raise too_large(max_bytes)
        path.hardlink_to(self._path)

    def close(self) -> None:
        """Close and delete the file."""
        discard(self._file, self._path)

    def _decode(self, data: bytes) -> None:
        if self._problem:
            return
        try:
            decoded = pybase64.b64decode(data, validate=True)
        except ValueError as error:
            self._problem = str(error)
        else:
            self._file.write(decoded)


class SpooledBody(Spool):
    """A JSON body whose long base64 data is in temporary files.

    `write` takes the parts of the body as they arrive. `finish` then sets `text`: the body, in which only the first
    characters of long data are left, followed by `#` and the name of the data.
    """

    def __init__(self, temp_path: Callable[[], Path]) -> None:
        """Start empty. `temp_path` returns the path of a new temporary file."""
        super().__init__(temp_path)
        self._texts: list[bytes] = []
        self._num_text = 0
        self._is_data = False
        self._head = bytearray()
        self._current: SpooledData | None = None
        #: The last bytes of the previous part, if they may be the beginning of `_START` or of an escape.
        self._rest = b""
        #: The position of the next backslash in the part that is being read; the length of the part if there is none.
        self._backslash = -1

    def write(self, part: bytes) -> None:
        """Read the next part of the body. Raises InvalidInput if over MAX_TEXT bytes stay in memory, and OSError."""
        self._body_hash.update(part)
        part, self._rest, self._backslash = self._rest + part, b"", -1
        position = 0
        while position < len(part):
            position = self._read_data(part, position) if self._is_data else self._read_text(part, position)

    def finish(self) -> None:
        """Read the end of the body, and set `text`. Raises as `write` does."""
        if self._is_data:
            self._end_data()
        self._append(self._rest)
        self.text = b"".join(self._texts)
        self._texts.clear()

    def close(self) -> None:
        """Delete the temporary files."""
        super().close()
        if self._current is not None:
            self._current.close()

    def _read_text(self, part: bytes, position: int) -> int:
        """Read text up to the start of base64 data or the end of the part; return the position after the text."""
        start = part.find(_START, position)
        # The last bytes may be the beginning of `_START`.
        end = max(position, len(part) - len(_START) + 1) if start < 0 else start + len(_START)
        self._append(part[position:end])
        self._is_data = start >= 0
        if self._is_data:
            return end
        self._rest = part[end:]
        return len(part)

    def _read_data(self, part: bytes, position: int) -> int:
        """Read base64 data up to its end or the end of the part; return the position after the data."""
        if self._backslash < position:
            found = part.find(b"\\", position)
            self._backslash = found if found >= 0 else len(part)
        # Without escapes, which is the usual case, the data ends at the next quotation mark.
        end = part.find(b'"', position, self._backslash)
        if end < 0:
            end = len(part)
            if self._backslash < len(part) and (match := _ESCAPED_DATA.match(part, position)):
                end = match.end()
        self._append_data(part[position:end])
        if end == len(part):
            return end
        if _PARTIAL_ESCAPE.match(part, end):
            self._rest = part[end:]
            return len(part)
        self._end_data()
        return end

    def _append(self, text: bytes) -> None:
        self._num_text += len(text)
        if self._num_text > MAX_TEXT:
            message = f"Body should have at most {MAX_TEXT} bytes besides the base64 data of its data URIs"
            raise InvalidInput.of("too_long", ("body",), message)
        self._texts.append(text)

    def _append_data(self, data: bytes) -> None:
        # Replace the escapes, which does not change what the JSON means.
        data = json.loads(b'"%s"' % data).encode() if b"\\" in data else data
        if self._current is not None:
            self._current.write(data)
            return
        self._head += data
        if len(self._head) > MAX_IN_MEMORY:
            self._current = SpooledData(self._temp_path())
            self._current.write(bytes(self._head))
            del self._head[_NUM_QUOTED:]

    def _end_data(self) -> None:
        self._is_data = False
        if self._current is not None:
            name = self._current.finish()
            # If the same data occurs twice, it has the same name both times, and only one file is kept.
            self._files.setdefault(name, self._current)
            if self._files[name] is not self._current:
                self._current.close()
            self._head += b"#" + name.encode()
        self._append(bytes(self._head))
        self._head.clear()
        self._current = None
