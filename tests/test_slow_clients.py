"""Many slow clients at once: all are cut off in time, and the others hardly notice."""

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

from server.deadlines import TimedProtocol, timed
from tests.serving import TEST_MODELS, serving
from tests.slow_clients import IN_HEADER, SlowClients, few_files, in_body
from tests.test_deadlines import QUICK, answered, listening

#: What a server is started with on most systems, of which each connection takes one.
USUAL_FILES = 1024
#: Seconds beside the limit: of waking up, under load.
GRACE = 1.0


def test_fifty_at_once() -> None:
    """Ten of each kind; meanwhile one that is not slow is served."""
    with listening(timed(**QUICK)) as port, SlowClients(port, {**IN_HEADER, **in_body("/large")}, 10) as slow:
        with socket.create_connection(("127.0.0.1", port)) as other:
            assert answered(other)
            slow.watch(0.02, 60)
        assert {name: len(times) for name, times in slow.closed.items()} == dict.fromkeys(slow.kinds, 10)


def p99_while(url: str, act: Callable[[], object]) -> float:
    """Of the seconds that whole runs take, one after the other, while this is done."""
    is_over = threading.Event()

    def run() -> list[float]:
        taken = []
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            while not is_over.is_set():
                begun = time.monotonic()
                client.post("/test/null", json={"prompt": "x", "num_inference_steps": 1}).raise_for_status()
                taken.append(time.monotonic() - begun)
        return taken

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(run)
        try:
            act()
        finally:
            is_over.set()
        taken = sorted(running.result())
    return taken[len(taken) * 99 // 100]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_thousand_at_once(tmp_path: Path) -> None:
    """Two hundred a second, with the limits that the server really has."""
    with ExitStack() as opened:
        with few_files(USUAL_FILES):
            server = opened.enter_context(serving(tmp_path, TEST_MODELS))
        url = server.ready().url
        content = bytes(32 * 2**20)
        path = urlsplit(httpx.post(f"{url}/files/upload", content=content, trust_env=False).json()["access_url"]).path
        kinds = {**IN_HEADER, **in_body(path)}
        before = p99_while(url, lambda: threading.Event().wait(TimedProtocol.body_seconds))
        with SlowClients(urlsplit(url).port or 0, kinds, 200, pace=1 / 40) as slow:
            after = p99_while(url, lambda: slow.watch(1.0, 2 * TimedProtocol.body_seconds))
    assert {name: len(times) for name, times in slow.closed.items()} == dict.fromkeys(kinds, 200)
    worst = {name: max(times) for name, times in slow.closed.items()}
    print(f"p99 {before * 1000:.1f} ms alone, {after * 1000:.1f} ms beside them; closed after at most {worst}")
    for name in kinds:
        limit = TimedProtocol.header_seconds if name in IN_HEADER else TimedProtocol.body_seconds
        assert min(slow.closed[name]) > limit - GRACE
        assert worst[name] <= limit + GRACE
    assert after < 2 * before
