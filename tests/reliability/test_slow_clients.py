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

from server.net.timeouts import with_limits
from tests.http.test_timeouts import QUICK, answered, listening
from tests.support.server_process import TEST_MODELS, serving
from tests.support.slow_clients import IN_HEADER, SlowClients, few_files, in_body

#: What a server is started with on most systems, of which each connection takes one.
USUAL_FILES = 1024
#: Seconds within which a client is closed that is late with a header, or with a body or with reading.
HEADER, BODY = 10.0, 60.0
#: Seconds by which the limits are below that, and by which a connection is older than its client knows.
GRACE = 1.0


def test_fifty_at_once() -> None:
    """Ten of each kind; meanwhile one that is not slow is served."""
    with listening(with_limits(**QUICK)) as port, SlowClients(port, {**IN_HEADER, **in_body("/large")}, 10) as slow:
        with socket.create_connection(("127.0.0.1", port)) as other:
            assert answered(other)
            slow.watch(0.02, 60)
        assert {name: len(times) for name, times in slow.closed.items()} == dict.fromkeys(slow.kinds, 10)


def runs_while(url: str, act: Callable[[], object]) -> list[float]:
    """The seconds that whole runs take, one after the other, while this is done."""
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
        return running.result()


def p99(taken: list[float]) -> float:
    return sorted(taken)[len(taken) * 99 // 100]


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
        slow = SlowClients(urlsplit(url).port or 0, kinds, 200, pace=1 / 40)

        def come_and_go() -> None:
            with slow:
                slow.watch(1.0, 2 * BODY)

        def nobody() -> None:
            threading.Event().wait(BODY / 2)

        # Before and after, for the machine is not the same all the time.
        alone, beside = runs_while(url, nobody), runs_while(url, come_and_go)
        alone += runs_while(url, nobody)
    assert {name: len(times) for name, times in slow.closed.items()} == dict.fromkeys(kinds, 200)
    worst = {name: max(times) for name, times in slow.closed.items()}
    print(f"p99 {p99(alone) * 1000:.1f} ms alone, {p99(beside) * 1000:.1f} ms beside them; closed after {worst}")
    for name in kinds:
        promised = HEADER if name in IN_HEADER else BODY
        assert promised - 2 * GRACE < min(slow.closed[name])
        assert worst[name] <= promised
    assert p99(beside) < 2 * p99(alone)
