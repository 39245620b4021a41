"""Reading a multipart form as it arrives: its files go to temporary files, and its other fields stay in memory."""

import logging
import secrets
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from pydantic_core import to_json
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.errors import InvalidInput, InvalidInputFile
from server.inputs.spool import MAX_TEXT, Spool

#: The most parts of a form. OpenAI's API has about 20 fields, and takes 16 images.
MAX_PARTS = 100
# The parser warns of each odd byte, so a form of a few megabytes could fill the log.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


class FormFile:
    """A file of a form. `convert`, if set, writes the content to use, from the file at its first path to the second."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.convert: Callable[[Path, Path], object] | None = None
        #: A data URI that stands for this file, as in the text of every body.
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

    def link(self, path: Path) -> None:
        """Write the converted content to `path`, or hard-link the file there.

        Raises InvalidInputFile for a file that is too large or cannot be converted, and OSError.
        """
        if self._size > self._max_bytes:
            message = f"The file is larger than {self._max_bytes / 2**20:.0f} MiB"
            raise InvalidInputFile("file_too_large", message, max_size=self._max_bytes)
        if self.convert is None:
            path.hardlink_to(self._path)
        else:
            self.convert(self._path, path)

    def close(self) -> None:
        """Close and delete the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)


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
        self._num_parts = self._num_text = 0
        self._is_complete = False
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise _invalid(f"Body should be multipart/form-data with a boundary, not {content_type[:100] or 'untyped'}")
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
            )
        except FormParserError as error:
            raise _invalid(f"Body has an invalid boundary: {error}") from None

    def write(self, part: bytes) -> None:
        """Read the next part of the body. Raises InvalidInput for a malformed or oversized form, and OSError."""
        self._body_hash.update(part)
        try:
            self._parser.write(part)
        except FormParserError as error:
            raise _invalid(f"Body is not a valid multipart form: {error}") from None

    def finish(self) -> None:
        """Check that the form is complete, and set `text`: the fields that are not files, as JSON strings."""
        if not self._is_complete:
            raise _invalid("Body is not a valid multipart form: its last boundary is missing")
        self.text = to_json({name: str(value, "utf-8", "replace") for name, value in self._fields.items()})

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
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = str(options.get(b"name", b""), "utf-8", "replace").removesuffix("[]")
        if b"filename" in options:
            self._part = file = FormFile(self._temp_path(), self._max_file_bytes)
            self._files[file.name] = file
            self.files[name].append(file)
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

    def _end(self) -> None:
        self._is_complete = True


def _invalid(message: str) -> InvalidInput:
    return InvalidInput([{"type": "multipart_invalid", "loc": ["body"], "msg": message, "input": ""}])
