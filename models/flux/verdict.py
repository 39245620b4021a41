"""The results of the self test, kept for each GPU model, driver and combination of library versions."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

#: The name of the test of compiled blocks with products in fp8.
FP8_TEST = "blocks compiled in fp8"
#: Seconds for the whole self test, most of which is compiling.
_SECONDS = 900.0
_TOO_LONG = "the self test took too long"
_SIGNAL = "the process ended by signal {}"
#: The messages of a self test that was stopped from outside: by SIGINT, SIGKILL or SIGTERM.
_STOPPED = [_SIGNAL.format(number) for number in (2, 9, 15)]


def failures(directory: Path | None) -> dict[str, str]:
    """Return the message of each test that failed on the GPU, by its name; empty without a directory, as on a CPU."""
    found = results(directory) if directory else []
    return {result["name"]: result["message"] for result in found if result["state"] == "failed"}


def results(directory: Path, *, renew: bool = False) -> list[dict[str, Any]]:
    """Return the results of the self test on the GPU: those kept in `directory`, or new ones.

    With `renew`, the results are always new. New results are kept, unless the test was stopped or memory was short.
    """
    # PyTorch has no public name for the driver's version.
    path = directory / f"self-test-driver-{torch._C._cuda_getDriverVersion()}.json"
    kept = _read(path)
    if kept is not None and not renew:
        return kept
    log.info("testing the GPU, once for this driver and these versions of the libraries; this takes minutes")
    found = run_in_child("cuda", directory)
    if not _is_transient(found):
        _write(path, found)
    for result in found:
        level = logging.WARNING if result["state"] == "failed" else logging.INFO
        log.log(level, "%s %s: %s", result["name"], result["state"], result["message"])
    return found


def _read(path: Path) -> list[dict[str, Any]] | None:
    """Return the results in a file; None if there is no file, or it is damaged."""
    try:
        results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return results


def _write(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """Write results to a file. Several runners of one machine may do so at the same time."""
    temp_path = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        temp_path.replace(path)
    except OSError as error:
        log.warning("the results of the self test cannot be kept: %s", error)


def _is_transient(found: Sequence[dict[str, Any]]) -> bool:
    """Return whether the results say nothing about the GPU, because the test was stopped or memory was short."""
    failed = {result["name"]: result["message"] for result in found if result["state"] == "failed"}
    return "memory" in failed or any(message in _STOPPED for message in failed.values())


def run_in_child(device: str, directory: Path | None, seconds: float = _SECONDS) -> list[dict[str, Any]]:
    """Run the self test in a child process, because a broken driver may end it; return the results that it printed.

    If the process dies, the test that was running counts as failed, and another process runs the tests after it. If all
    of it takes more than `seconds`, or it is stopped from outside, that test is the last one.
    """
    deadline = time.monotonic() + seconds
    results: list[dict[str, Any]] = []
    died_in = ""
    while True:
        printed, end = _run_once(device, directory, died_in, max(0.0, deadline - time.monotonic()))
        results += [line for line in printed if "state" in line]
        if not end:
            return results
        last = next((str(line["running"]) for line in reversed(printed) if "running" in line), "")
        results.append({"name": last or "self test", "state": "failed", "message": end})
        if not last or end in (_TOO_LONG, *_STOPPED):
            return results
        died_in = last


def _run_once(device: str, directory: Path | None, died_in: str, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Run the self test, or only the tests after `died_in`; return what it printed, and how it failed, or ""."""
    # With -P, Python does not import an application's `models` from the working directory.
    command = [sys.executable, "-P", "-m", "models.self_test", device]
    command += [*(["--directory", str(directory)] if directory else []), *(["--after", died_in] if died_in else [])]
    try:
        # In a new session, so that Ctrl+C reaches only the server.
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=seconds, check=False, start_new_session=True
        )
        output, end = done.stdout, _end(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or ""
        output, end = printed.decode(errors="replace") if isinstance(printed, bytes) else printed, _TOO_LONG
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], end


def _end(code: int, errors: str) -> str:
    """Describe the end of a process; empty if the process succeeded."""
    if code == 0:
        return ""
    if code < 0:
        return _SIGNAL.format(-code)
    return f"the process ended with exit code {code}: {errors.strip().rpartition(chr(10))[2][:300]}"
