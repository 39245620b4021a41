"""The URLs of input files: data URIs, and the URLs of files in this server's store or elsewhere."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pybase64

from server.errors import InvalidInputFile
from server.inputs.spool import too_large
from server.storage.file_store import NAME

_OWN_PATH = re.compile(rf"/files/({NAME.pattern})")
_SCHEME = re.compile(r"[a-z][a-z0-9+.\-]*://", re.IGNORECASE)
_DATA = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
#: Characters of base64 that are decoded at a time: a multiple of four, because four characters are three bytes.
_PART = 2**20


def has_scheme(url: str) -> bool:
    """Return whether a URL begins with a scheme and two slashes, such as https://."""
    return _SCHEME.match(url[:100]) is not None


def stored_file_name(url: str) -> str | None:
    """Return the name of the file if the URL's path has the form of a file in this server's store, otherwise None.

    Any host is accepted, because the name has 128 random bits.
    """
    try:
        path = urlsplit(url).path
    except ValueError:
        return None
    match = _OWN_PATH.fullmatch(path)
    return match[1] if match else None


def not_a_url_message(kind: str) -> str:
    """Return the error message for an input that is neither a URL nor a data URI, such as a path."""
    more = ", or a hub id such as owner/name" if kind != "image" else ""
    return (
        "This should be an http or https URL, a data URI, or the URL of a file uploaded to this server"
        f"{more}; paths on the server's own disk are never read"
    )


def decode_data_uri(url: str, temp_path: Path, max_bytes: int) -> None:
    """Decode a data URI into a file. Raises OSError, and InvalidInputFile for invalid base64 or too many bytes."""
    match = _DATA.match(url)
    if not match:
        raise InvalidInputFile("file_download_error", "A data URI should have the form data:TYPE;base64,...")
    if (len(url) - match.end()) * 3 // 4 > max_bytes:
        raise too_large(max_bytes)
    starts = range(match.end(), len(url), _PART)
    if 0 <= url.find("=", match.end()) < len(url) - 2:
        raise InvalidInputFile("file_download_error", "The data URI is not base64: data follows its padding")
    try:
        # Decode in parts, because decoding holds Python's global lock, and other threads must run in between.
        with temp_path.open("wb") as file:
            for start in starts:
                file.write(pybase64.b64decode(url[start : start + _PART], validate=True))
    except ValueError as error:
        raise InvalidInputFile("file_download_error", f"The data URI is not base64: {error}") from None
