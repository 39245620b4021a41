"""The time from the start of the process to the first /health, and until the demo weights are ready.

python -m bench.startup [--rounds 5]
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from tests.support.server_process import Server


def main() -> None:
    """Print the medians of both times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    alive, ready = zip(*(_start() for _ in range(rounds)), strict=True)
    print(f"to /health {statistics.median(alive):.2f} s (worst {max(alive):.2f})")
    print(f"to ready   {statistics.median(ready):.2f} s (worst {max(ready):.2f})")


def _start() -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        server = Server(Path(directory), "demo")
        url = server.url
        httpx.get(f"{url}/health").raise_for_status()
        alive = time.perf_counter() - start
        server.ready()
        ready = time.perf_counter() - start
        server.stop()
        return alive, ready


if __name__ == "__main__":
    main()
