"""A program of this package that reads one untrusted file, run as a separate process."""

import logging
import os
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import ModuleType
from typing import IO

from server.errors import InternalError

#: Seconds that a process may take; enough on a busy machine.
MAX_SECONDS = 60.0
#: The variables by which Python finds its libraries and the user's packages. The program gets no others, because some
#: hold secrets of the server.
_VARIABLES = ("HOME", "LD_LIBRARY_PATH")
#: The most bytes of error messages.
_MAX_ERRORS = 2000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The end of a program: its exit status, negative for a signal, its output and its error messages."""

    status: int
    output: bytes
    errors: str


def run_program(program: ModuleType, file: Path, *arguments: str, expected: Collection[int] = (0,)) -> Result:
    """Run a program with the file and the arguments; return its result. Blocks until the process ends.

    The output goes to temporary files in the directory of `file`, so that RLIMIT_FSIZE limits its size.

    Raises InternalError if the process takes too long or ends with a status that is not expected: this is a fault of
    the machine, and the log has the reason. Raises OSError if the files or the process cannot be created.
    """
    # With -E and -P, Python uses neither its own variables nor the working directory.
    command = [sys.executable, "-E", "-P", "-W", "ignore", str(program.__file__), str(file), *arguments]
    environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    with TemporaryFile(dir=file.parent) as output, TemporaryFile(dir=file.parent) as errors:
        try:
            done = subprocess.run(  # noqa: S603  a fixed program, and a path that the server made
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment,
                timeout=MAX_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            log.error("%s did not end within %g seconds", program.__name__, MAX_SECONDS)
            message = f"The check of the file did not end within {MAX_SECONDS:g} seconds; try again"
            raise InternalError(message) from error
        result = Result(done.returncode, _read(output), _read(errors, _MAX_ERRORS).decode("utf-8", "replace"))
    if result.status not in expected:
        log.error("%s ended with the status %d: %s", program.__name__, result.status, result.errors)
        raise InternalError("The file could not be checked because of a fault of the server; try again")
    return result


def _read(file: IO[bytes], max_bytes: int = -1) -> bytes:
    file.seek(0)
    return file.read(max_bytes)
