"""The results of the self test, kept for each GPU model, driver and combination of library versions."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

#: Seconds for the whole self test, most of which is compiling.
_SECONDS = 900.0
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

    If the process dies or takes too long, the last result is that of the test that was running, as failed.
    """
    command = [sys.executable, "-m", "models.self_test", device, *([str(directory)] if directory else [])]
    try:
        # In a new session, so that Ctrl+C reaches only the server.
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=seconds, check=False, start_new_session=True
        )
        output, end = done.stdout, _end(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or ""
        output = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        end = f"it took more than {seconds:.0f} s"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    results = [line for line in lines if "state" in line]
    if end:
        running = _last_running(lines)
        results.append({"name": running, "state": "failed", "message": end})
    return results


def _end(code: int, errors: str) -> str:
    """Describe the end of a process; empty if the process succeeded."""
    if code == 0:
        return ""
    if code < 0:
        return _SIGNAL.format(-code)
    return f"the process ended with exit code {code}: {errors.strip().rpartition(chr(10))[2][:300]}"


def _last_running(lines: Sequence[dict[str, Any]]) -> str:
    return next((str(line["running"]) for line in reversed(lines) if "running" in line), "self test")
