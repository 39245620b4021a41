"""Tests with many slow clients at once: each is cut off in time, and other clients are hardly slower."""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from server.net.timeouts import with_limits
from tests.http.test_timeouts import QUICK, is_answered, listening
from tests.support.server_process import TEST_MODELS, serving
from tests.support.slow_clients import IN_HEADER, SlowClients, in_body, limited_open_files

#: Usual limit of open files of a process. Each connection takes one of them.
USUAL_OPEN_FILES = 1024
#: Seconds within which the server cuts off a client that is slow with a header, or with a body or reading.
HEADER_SECONDS, BODY_SECONDS = 10.0, 60.0
#: Tolerance in seconds: the server's limits are this much lower, and clients may measure this much too little.
GRACE_SECONDS = 1.0


def test_fifty_slow_clients() -> None:
    """Run ten slow clients of each kind. Meanwhile a normal client is served."""
    with listening(with_limits(**QUICK)) as port, SlowClients(port, {**IN_HEADER, **in_body("/large")}, 10) as slow:
        with socket.create_connection(("127.0.0.1", port)) as other:
            assert is_answered(other)
            slow.watch(0.02, 60)
        assert {name: len(times) for name, times in slow.closed.items()} == dict.fromkeys(slow.kinds, 10)


def run_durations(url: str, action: Callable[[], object]) -> list[float]:
    """Run requests one after the other while the action lasts, and return the seconds of each."""
    is_over = threading.Event()

    def run() -> list[float]:
        durations = []
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            while not is_over.is_set():
                started_at = time.monotonic()
                client.post("/test/null", json={"prompt": "x", "num_inference_steps": 1}).raise_for_status()
                durations.append(time.monotonic() - started_at)
        return durations

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(run)
        try:
            action()
        finally:
            is_over.set()
        return running.result()


def p99(durations: list[float]) -> float:
    return sorted(durations)[len(durations) * 99 // 100]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_thousand_slow_clients(tmp_path: Path) -> None:
    """Start two hundred slow clients a second, a thousand in all, against the server's default limits."""
    with ExitStack() as stack:
        with limited_open_files(USUAL_OPEN_FILES):
            server = stack.enter_context(serving(tmp_path, TEST_MODELS))
        url = server.ready().url
        content = bytes(32 * 2**20)
        path = urlsplit(httpx.post(f"{url}/files/upload", content=content, trust_env=False).json()["access_url"]).path
        kinds = {**IN_HEADER, **in_body(path)}
        slow = SlowClients(urlsplit(url).port or 0, kinds, 200, pace=1 / 40)

        def run_slow_clients() -> None:
            with slow:
                slow.watch(1.0, 2 * BODY_SECONDS)

        def wait() -> None:
            threading.Event().wait(BODY_SECONDS / 2)

        # Measure before and after, since the speed of the machine varies.
        without_slow, with_slow = run_durations(url, wait), run_durations(url, run_slow_clients)
        without_slow += run_durations(url, wait)
    assert {name: len(times) for name, times in slow.closed.items()} == dict.fromkeys(kinds, 200)
    worst = {name: max(times) for name, times in slow.closed.items()}
    print(f"p99 {p99(without_slow) * 1000:.1f} ms alone, {p99(with_slow) * 1000:.1f} ms with slow clients")
    print(f"closed after {worst}")
    for name in kinds:
        limit = HEADER_SECONDS if name in IN_HEADER else BODY_SECONDS
        assert limit - 2 * GRACE_SECONDS < min(slow.closed[name])
        assert worst[name] <= limit
    assert p99(with_slow) < 2 * p99(without_slow)
