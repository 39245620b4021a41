"""The cost of a request to a model that does nothing, behind this server and behind FastAPI, LitServe and BentoML.

    make peers, or: python -m bench.peers [--clients 1,16,64] [--rounds 4] [--seconds 2] [--json FILE]

Every request is the same JSON of prompt, size, steps and seed, validated by pydantic. Responses are JSON: all in one
shape with the URL of an image, except those of "submit" and "task". The work in between and the guarantees differ:

- "FastAPI", "LitServe" and "BentoML" make no image and store nothing. FastAPI calls the model on one of its threads,
  BentoML on its only thread, LitServe in a separate process. All settings are defaults, except that logs are off.
- "flux-server, run" writes the request to the disk before it starts, makes an image of 64x64 pixels, encodes it as a
  JPEG with metadata, and writes the JPEG and then the response: three transactions, two more fsyncs, and a log line.
- "FastAPI, kept" gives the same guarantee by hand: two transactions, the image without metadata, two fsyncs.
- "flux-server, submit" responds when the request is on the disk. "BentoML, task" is BentoML's equivalent, also with
  SQLite. Behind both, the model is busy all the time, as a real model would be for seconds.

The servers run one at a time, in separate processes. This process sends the requests, on the same two cores. Each round
starts with a different server. Figures are medians of the rounds; ratios are medians of the ratios within a round.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import httpx

from bench.support import load_client
from bench.support.load_client import load, repeating_client, request
from bench.support.subprocess_server import running_server
from tests.support.server_process import ROOT, TEST_MODELS, free_port, open_gate, serving, wait_until_claimed

PYTHON = ROOT / "build" / "peers" / "bin" / "python"
BODY = {"prompt": "a red apple", "image_size": {"width": 64, "height": 64}, "num_inference_steps": 1, "seed": 1}
WARM_UP = 0.3
RUN, SUBMIT = "flux-server, run", "flux-server, submit"
#: Targets that respond with an image's URL, and targets that store the request for later. This server comes last in
#: each group.
GROUPS = (("FastAPI", "LitServe", "BentoML", "FastAPI, kept", RUN), ("BentoML, task", SUBMIT))

#: The routes to measure on a running server, in order: a name, the port and the path.
Targets = Iterator[tuple[str, int, str]]
#: The figures of each round, by name and number of clients.
Figures = dict[str, dict[int, list[dict[str, float]]]]


@contextmanager
def ours() -> Iterator[Targets]:
    """Run this server with the test models only."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with (
            serving(directory / "data", TEST_MODELS, max_queue_length="1000000") as server,
            open_gate(directory / "gate") as gate,
        ):
            yield _our_targets(server.ready().url, gate.path)


def _our_targets(url: str, gate: Path) -> Targets:
    port = int(url.rsplit(":", 1)[1])
    yield RUN, port, "/test/null"
    with httpx.Client() as load_client:
        blocking = load_client.post(f"{url}/queue/test/gate", json={"prompt": str(gate), "seed": 1})
        wait_until_claimed(load_client, blocking.json()["status_url"])
    yield SUBMIT, port, "/queue/test/null"


@contextmanager
def fastapi(python: Path) -> Iterator[Targets]:
    """Run FastAPI in uvicorn, with uvloop and httptools like this server."""
    app = "bench.peer_servers.with_fastapi:app"
    command = ("-m", "uvicorn", app, "--log-level", "warning", "--no-access-log", "--port")
    with _peer(python, command, "/docs") as port:
        yield iter([("FastAPI", port, "/generate"), ("FastAPI, kept", port, "/kept")])


@contextmanager
def litserve(python: Path) -> Iterator[Targets]:
    """Run LitServe: one process for HTTP and one for the model."""
    with _peer(python, ("-m", "bench.peer_servers.with_litserve"), "/health") as port:
        yield iter([("LitServe", port, "/generate")])


@contextmanager
def bentoml(python: Path) -> Iterator[Targets]:
    """Run BentoML with one worker; -q turns off the log line for each task."""
    service = "bench.peer_servers.with_bentoml:Null"
    command = ("-m", "bentoml", "serve", service, "-q", "--host", "127.0.0.1", "--port")
    with _peer(python, command, "/readyz") as port:
        yield iter([("BentoML", port, "/generate"), ("BentoML, task", port, "/hold/submit")])


@contextmanager
def _peer(python: Path, command: Sequence[str], health: str) -> Iterator[int]:
    """Start `command` with a free port as its last argument; yield the port once the server is healthy."""
    port = free_port()
    # Ignore errors of the cleanup: the processes of the server may still be ending while the directory is deleted.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        environment = {"TMPDIR": directory, "BENTOML_HOME": directory, "BENTOML_DO_NOT_TRACK": "True"}
        with running_server((str(python), *command, str(port)), f"http://127.0.0.1:{port}{health}", environment):
            yield port


def measure(python: Path, clients: Sequence[int], rounds: int, seconds: float) -> Figures:
    """Measure every server in each of `rounds` rounds; return all figures. Raises SystemExit if a request fails."""
    servers: list[Callable[[], AbstractContextManager[Targets]]] = [
        ours,
        *(partial(peer, python) for peer in (fastapi, litserve, bentoml)),
    ]
    results: Figures = {}
    for number in range(rounds):
        turn = number % len(servers)
        for open_server in servers[turn:] + servers[:turn]:
            with open_server() as targets:
                for name, port, path in targets:
                    body = request("POST", path, json.dumps(BODY).encode())
                    load(port, max(clients), repeating_client(body, WARM_UP))
                    for count in clients:
                        figures = load(port, count, repeating_client(body, seconds))
                        if figures.bad:
                            raise SystemExit(
                                f"{name}: {figures.bad} of {len(figures.seconds)} requests failed; all must succeed"
                            )
                        results.setdefault(name, {}).setdefault(count, []).append(_figures_of(figures))
    return {name: results[name] for group in GROUPS for name in group}


def _figures_of(figures: load_client.Figures) -> dict[str, float]:
    quantiles = {f"p{100 * share:.0f}_ms": figures.milliseconds(share) for share in (0.5, 0.99)}
    return {"per_second": figures.per_second, **quantiles}


def _print(results: Figures) -> None:
    print(f"{'':22}{'clients':>8}{'a second':>12}{'p50, ms':>10}{'p99, ms':>10}{'ours ÷ peer':>12}")
    for *names, own in GROUPS:
        for name in (*names, own):
            for clients, rounds in results[name].items():
                per_second, p50, p99 = (_median(rounds, key) for key in ("per_second", "p50_ms", "p99_ms"))
                pairs = zip(results[own][clients], rounds, strict=True)
                ratio = statistics.median(
                    own_round["per_second"] / peer_round["per_second"] for own_round, peer_round in pairs
                )
                print(f"{name:22}{clients:8}{per_second:12.0f}{p50:10.2f}{p99:10.2f}{ratio:12.2f}")


def _median(rounds: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(figures[key] for figures in rounds)


def main() -> None:
    """Print the table, and write the figures of every round to the file of --json."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--python", type=Path, default=PYTHON, help="an interpreter with bench/peer_servers/requirements.txt installed"
    )
    parser.add_argument("--clients", default="1,16,64")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.python.exists():
        parser.error(f"{options.python} does not exist; run `make peers` to install it")
    # The servers started below inherit the two cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    load_before = os.getloadavg()[0]
    print(f"load average {load_before:.1f} before, Python {sys.version.split()[0]}", flush=True)
    clients = [int(count) for count in options.clients.split(",")]
    results = measure(options.python, clients, options.rounds, options.seconds)
    _print(results)
    if options.json:
        output = {"load_before": load_before, "peers": results}
        options.json.write_text(json.dumps(output, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
