"""Reading a multipart form as it arrives: its files go to temporary files, and its other fields stay in memory."""

import logging
import re
import secrets
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from pydantic_core import to_json
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.errors import InvalidInput
from server.inputs.spool import MAX_TEXT, Spool, discard, too_large

#: The most parts of a form. OpenAI's API has about 20 fields, and takes 16 images.
MAX_PARTS = 100
#: The most headers of a part, and the most bytes of a header.
_MAX_HEADERS, _MAX_HEADER = 8, 4224
#: The most spaces and tabs after a boundary. RFC 2046 allows them without a limit, but the parser reads each one in
#: Python: 0.2 seconds for a megabyte.
_MAX_PADDING = 64
_QUOTED = re.compile(rb'"[^"]*"')
# The parser warns of each odd byte, so a form of a few megabytes could fill the log.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


class FormFile:
    """A file of a form.

    Attributes:
        convert: called, if set, with the path of the file and another path, to which it writes the content to use.
        name: the name of the file in its data URI.
        url: a data URI that stands for the file, as in the text of every body.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.convert: Callable[[Path, Path], object] | None = None
        self.name = secrets.token_hex(32)
        self.url = f"data:;base64,#{self.name}"
        self._path, self._max_bytes = path, max_bytes
        self._file = path.open("wb")
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append to the file, unless it becomes too large; `link` raises the error for that. Raises OSError."""
        self._size += len(data)
        if self._size <= self._max_bytes:
            self._file.write(data)

    def finish(self) -> None:
        """Close the file, which stays on the disk. Raises OSError."""
        self._file.close()

    def link(self, path: Path, max_bytes: int) -> None:
        """Write the converted content, of any size, to `path`, or hard-link the file there.

        Raises InvalidInputFile for a file with more than `max_bytes` or that cannot be converted, and OSError.
        """
        max_bytes = min(max_bytes, self._max_bytes)
        if self._size > max_bytes:
            raise too_large(max_bytes)
        if self.convert is None:
            path.hardlink_to(self._path)
        else:
            self.convert(self._path, path)

    @property
    def is_empty(self) -> bool:
        """Whether the client sent no bytes."""
        return self._size == 0

    def close(self) -> None:
        """Close and delete the file."""
        discard(self._file, self._path)


class SpooledForm(Spool):
    """A multipart form. `files` has its files by field name, without a final `[]`, and `text` its other fields."""

    def __init__(self, temp_path: Callable[[], Path], content_type: str, max_file_bytes: int) -> None:
        """Start empty. Raises InvalidInput if `content_type` is not that of a multipart form."""
        super().__init__(temp_path)
        self.files = defaultdict[str, list[FormFile]](list)
        self._max_file_bytes = max_file_bytes
        self._fields: dict[str, bytearray] = {}
        self._headers: dict[bytes, bytes] = {}
        self._header, self._value = bytearray(), bytearray()
        self._part: FormFile | bytearray = bytearray()
        #: The field of the current part, and whether the part, if empty, is a file input without a chosen file.
        self._name, self._may_be_unused = "", False
        self._num_parts = self._num_boundaries = self._num_text = 0
        self._tail = b""
        self._is_complete = False
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise _invalid(f"Body should be multipart/form-data with a boundary, not {content_type[:100] or 'untyped'}")
        self._boundary = b"\r\n--" + options[b"boundary"]
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._open_part,
                    "on_part_data": self._write_part,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
                max_header_count=_MAX_HEADERS,
                max_header_size=_MAX_HEADER,
            )
        except FormParserError as error:
            raise _invalid(f"Body has an invalid boundary: {error}") from None

    def write(self, part: bytes) -> None:
        """Read the next part of the body. Raises InvalidInput for a malformed or oversized form, and OSError."""
        self._body_hash.update(part)
        self._check_boundaries(part)
        try:
            self._parser.write(part)
        except FormParserError as error:
            raise _invalid(f"Body is not a valid multipart form: {error}") from None

    def finish(self) -> None:
        """Check that the form is complete, and set `text`: the fields that are not files, as JSON strings."""
        if not self._is_complete:
            raise _invalid("Body is not a valid multipart form: its last boundary is missing")
        self.text = to_json({name: str(value, "utf-8", "replace") for name, value in self._fields.items()})

    def _check_boundaries(self, part: bytes) -> None:
        """Check the number of boundaries, and the padding after them: the parser is slow at both.

        Lines in a file that only start like a boundary count too. A boundary across two parts of the body does not
        count, which is enough here.
        """
        self._num_boundaries += part.count(self._boundary)
        if self._num_boundaries > MAX_PARTS:
            raise _invalid(f"Body should have at most {MAX_PARTS} parts")
        text = self._tail + part
        starts = [after[: _MAX_PADDING + 1] for after in text.split(self._boundary)[1:]]
        if any(len(start) > _MAX_PADDING and not start.strip(b" \t") for start in starts):
            raise _invalid(f"Body should have at most {_MAX_PADDING} spaces after a boundary")
        self._tail = text[-len(self._boundary) - _MAX_PADDING :]

    def _begin_part(self) -> None:
        self._headers.clear()
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise _invalid(f"Body should have at most {MAX_PARTS} parts")

    def _end_header(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _open_part(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        _, options = parse_options_header(disposition)
        name = str(options.get(b"name", b""), "utf-8", "replace").removesuffix("[]")
        self._may_be_unused = options.get(b"filename") == b""
        # The parser ignores `filename*`, a file name in another encoding, which some clients send alone.
        if b"filename" in options or b"filename*" in _QUOTED.sub(b"", disposition).lower():
            self._part, self._name = FormFile(self._temp_path(), self._max_file_bytes), name
            self._files[self._part.name] = self._part
        else:
            self._part = self._fields[name] = bytearray()

    def _write_part(self, data: bytes, start: int, end: int) -> None:
        if isinstance(self._part, FormFile):
            self._part.write(data[start:end])
            return
        self._num_text += end - start
        if self._num_text > MAX_TEXT:
            raise _invalid(f"Body should have at most {MAX_TEXT} bytes besides its files")
        self._part += data[start:end]

    def _end_part(self) -> None:
        if isinstance(self._part, FormFile):
            self._part.finish()
            if not (self._may_be_unused and self._part.is_empty):
                self.files[self._name].append(self._part)

    def _end(self) -> None:
        self._is_complete = True


def _invalid(message: str) -> InvalidInput:
    return InvalidInput.of("multipart_invalid", ("body",), message)
