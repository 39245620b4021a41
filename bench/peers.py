"""A model that does nothing, behind this server and behind FastAPI, LitServe and BentoML: what a request costs.

    make peers, or: python -m bench.peers [--clients 1,16,64] [--rounds 4] [--seconds 2] [--json FILE]

A request is always the same JSON of prompt, size, steps and seed, validated by pydantic, and the answer is JSON of one
shape with the address of a picture. What is done in between differs, and with it what is promised:

- "FastAPI", "LitServe" and "BentoML" make no picture and keep nothing. FastAPI calls the model on one of its threads,
  BentoML on its only one, LitServe in a process of its own. All is as it comes, but for logs, which are off.
- "flux-server, run" puts the request on the disk before it begins, paints 64x64 pixels, encodes them as a JPEG with its
  marks, and puts that on the disk and then the answer: three transactions, two fsyncs more, and a line in the log.
- "FastAPI, kept" is what that takes when written by hand: two transactions, the picture without marks, two fsyncs.
- "flux-server, submit" answers when the request is on the disk. "BentoML, task" is BentoML's way to do that, and SQLite
  too. Behind both stands a model that is at work all the while, as a real one would be for seconds.

Every server has processes of its own, one server at a time, and this one sends the requests, all on the same two cores.
Each round begins with another server. Figures are medians of the rounds, ratios medians of those within a round.
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
from bench.support.load_client import again, load, request
from bench.support.subprocess_server import answering
from tests.support.server_process import ROOT, TEST_MODELS, free_port, gated, in_progress, serving

PYTHON = ROOT / "build" / "peers" / "bin" / "python"
BODY = {"prompt": "a red apple", "image_size": {"width": 64, "height": 64}, "num_inference_steps": 1, "seed": 1}
WARM_UP = 0.3
RUN, SUBMIT = "flux-server, run", "flux-server, submit"
#: Those that answer with a picture's address, and those that keep the request for later; each with ours at its end.
GROUPS = (("FastAPI", "LitServe", "BentoML", "FastAPI, kept", RUN), ("BentoML, task", SUBMIT))

#: What is asked of a server that runs, in turn: a name, its port and the path.
Asked = Iterator[tuple[str, int, str]]
#: By name and number of clients, the figures of each round.
Figures = dict[str, dict[int, list[dict[str, float]]]]


@contextmanager
def ours() -> Iterator[Asked]:
    """This server, with the test models alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            serving(folder / "data", TEST_MODELS, max_queue_length="1000000") as server,
            gated(folder / "gate") as gate,
        ):
            yield _ours(server.ready().url, gate.path)


def _ours(url: str, gate: Path) -> Asked:
    port = int(url.rsplit(":", 1)[1])
    yield RUN, port, "/test/null"
    with httpx.Client() as load_client:
        held = load_client.post(f"{url}/queue/test/gate", json={"prompt": str(gate), "seed": 1})
        in_progress(load_client, held.json()["status_url"])
    yield SUBMIT, port, "/queue/test/null"


@contextmanager
def fastapi(python: Path) -> Iterator[Asked]:
    """In uvicorn, with uvloop and httptools as this server has them."""
    app = "bench.peer_servers.with_fastapi:app"
    command = ("-m", "uvicorn", app, "--log-level", "warning", "--no-access-log", "--port")
    with _peer(python, command, "/docs") as port:
        yield iter([("FastAPI", port, "/generate"), ("FastAPI, kept", port, "/kept")])


@contextmanager
def litserve(python: Path) -> Iterator[Asked]:
    """One process that answers and one that predicts; it reports nothing to anybody."""
    with _peer(python, ("-m", "bench.peer_servers.with_litserve"), "/health") as port:
        yield iter([("LitServe", port, "/generate")])


@contextmanager
def bentoml(python: Path) -> Iterator[Asked]:
    """One worker; -q keeps it from a line in the log for each task."""
    service = "bench.peer_servers.with_bentoml:Null"
    command = ("-m", "bentoml", "serve", service, "-q", "--host", "127.0.0.1", "--port")
    with _peer(python, command, "/readyz") as port:
        yield iter([("BentoML", port, "/generate"), ("BentoML, task", port, "/hold/submit")])


@contextmanager
def _peer(python: Path, command: Sequence[str], health: str) -> Iterator[int]:
    """The port of a server that is started by this command with its port behind it."""
    port = free_port()
    # Some of its processes were killed a moment ago when the folder goes.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = {"TMPDIR": folder, "BENTOML_HOME": folder, "BENTOML_DO_NOT_TRACK": "True"}
        with answering((str(python), *command, str(port)), f"http://127.0.0.1:{port}{health}", environment):
            yield port


def measured(python: Path, clients: Sequence[int], rounds: int, seconds: float) -> Figures:
    """Ask all of them, in so many rounds. SystemExit when one refuses a request."""
    servers: list[Callable[[], AbstractContextManager[Asked]]] = [
        ours,
        *(partial(peer, python) for peer in (fastapi, litserve, bentoml)),
    ]
    found: Figures = {}
    for number in range(rounds):
        turn = number % len(servers)
        for opened in servers[turn:] + servers[:turn]:
            with opened() as asked:
                for name, port, path in asked:
                    body = request("POST", path, json.dumps(BODY).encode())
                    load(port, max(clients), again(body, WARM_UP))
                    for count in clients:
                        figures = load(port, count, again(body, seconds))
                        if figures.bad:
                            raise SystemExit(f"{name} refused {figures.bad} requests")
                        found.setdefault(name, {}).setdefault(count, []).append(_kept(figures))
    return {name: found[name] for group in GROUPS for name in group}


def _kept(figures: load_client.Figures) -> dict[str, float]:
    quantiles = {f"p{100 * share:.0f}_ms": figures.milliseconds(share) for share in (0.5, 0.99)}
    return {"per_second": figures.per_second, **quantiles}


def _print(found: Figures) -> None:
    print(f"{'':22}{'clients':>8}{'a second':>12}{'p50, ms':>10}{'p99, ms':>10}{'ours ÷ it':>12}")
    for *names, own in GROUPS:
        for name in (*names, own):
            for clients, rounds in found[name].items():
                per_second, p50, p99 = (_median(rounds, key) for key in ("per_second", "p50_ms", "p99_ms"))
                pairs = zip(found[own][clients], rounds, strict=True)
                ratio = statistics.median(mine["per_second"] / theirs["per_second"] for mine, theirs in pairs)
                print(f"{name:22}{clients:8}{per_second:12.0f}{p50:10.2f}{p99:10.2f}{ratio:12.2f}")


def _median(rounds: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(figures[key] for figures in rounds)


def main() -> None:
    """Print the table, and keep what every round gave where --json says."""
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
        parser.error(f"{options.python} is not there; `make peers` makes it")
    # What is started here stays on them too.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    busy = os.getloadavg()[0]
    print(f"load average {busy:.1f} before, Python {sys.version.split()[0]}", flush=True)
    clients = [int(count) for count in options.clients.split(",")]
    found = measured(options.python, clients, options.rounds, options.seconds)
    _print(found)
    if options.json:
        kept = {"load_before": busy, "peers": found}
        options.json.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
