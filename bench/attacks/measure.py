"""One attack from beginning to end: a fresh server, phases alone and under attack, and what was seen."""

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from bench.attacks import ATTACKER, OTHER, ROUNDS, SWEEP_SECONDS
from bench.attacks.attacker import Attack, Attacker, Told, attacking
from bench.attacks.hosting import hosting
from bench.attacks.victim import SUBMIT, Operation, Other, acting
from bench.attacks.watch import EVERY, Watch, is_machine_full
from tests.support.server_process import completed, serving

MODELS = Path(__file__).parent / "models"
#: What a phase of an attack may take beyond its time, in seconds.
_GRACE = 10.0
#: The other key's one upload that is to stay.
_KEPT = bytes(1_000_000)


@dataclass(frozen=True)
class Phase:
    """A while, by the monotonic clock."""

    is_attacked: bool
    begun_at: float
    ended_at: float
    #: Whether the server was at rest before it, or before the phase alone that precedes it.
    is_calm: bool

    def has(self, operation: Operation) -> bool:
        """Whether this began in it."""
        return self.begun_at <= operation.begun_at < self.ended_at


@dataclass
class Seen:
    """What was seen of one attack."""

    phases: list[Phase] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    told: Told = field(default_factory=Told)
    #: The seconds after each attacked phase until the server was at rest; None where it was not after the longest.
    rests: list[float | None] = field(default_factory=list)
    #: Why it was ended before its time, if it was.
    cut_short: str = ""
    #: Resident memory in bytes: idle, and the highest under attack.
    memory: tuple[int, int] = (0, 0)
    #: Bytes of the data folder: before the attack, the highest, and after a sweep.
    folder: tuple[dict[str, int], dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}, {}))
    #: How the other key's belongings were answered before the attack and after the sweep.
    belongings: tuple[dict[str, str], dict[str, str]] = field(default_factory=lambda: ({}, {}))
    #: The exit code of a server that did not outlive the attack.
    exit_code: int | None = None


class _Belongings:
    """What the other key has from the beginning: a finished request, its picture, and an uploaded file."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        submitted = client.post("/queue/bench/null", content=SUBMIT).raise_for_status().json()
        completed(client, submitted["status_url"])
        self.status_path = urlsplit(submitted["status_url"]).path
        picture = client.get(submitted["response_url"]).json()["images"][0]["url"]
        self._urls = {"result": submitted["response_url"], "picture": picture}
        uploaded = client.post("/files/upload", content=_KEPT, headers={"content-type": "image/png"})
        # At a rate of one request a day it may be refused.
        if uploaded.status_code == 200:
            self._urls["upload"] = uploaded.json()["access_url"]

    def answers(self) -> dict[str, str]:
        """The status of each of them now."""
        return {name: self._answer(url) for name, url in self._urls.items()}

    def _answer(self, url: str) -> str:
        try:
            return str(self._client.get(url).status_code)
        except httpx.TransportError as error:
            return type(error).__name__


def measure(attack: Attack, seconds: float) -> Seen:
    """Carry it out, in phases of so many seconds at most."""
    settings = {"models_dir": str(MODELS), "keys": f"{ATTACKER},{OTHER}", **attack.settings}
    seen = Seen()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        hosted, data_dir = Path(name) / "hosted", Path(name) / "data"
        hosted.mkdir()
        server = stack.enter_context(serving(data_dir, "bench/null=demo", **settings))
        url = server.ready().url
        port = urlsplit(url).port or 0
        hosted_url = stack.enter_context(hosting(hosted))
        attacker = stack.enter_context(attacking(attack.prepare, port, hosted, hosted_url))
        headers = {"authorization": f"Key {OTHER}"}
        client = stack.enter_context(httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False))
        belongings = _Belongings(client)
        before = belongings.answers()
        other = stack.enter_context(acting(port, attack.operations, belongings.status_path))
        watch = Watch(server.process.pid, data_dir)
        _take_turns(seen, watch, attacker, other, seconds)
        attacker.end()
        seen.operations = other.stop()
        watch.until_swept(SWEEP_SECONDS)
        seen.folder = (*seen.folder[:2], watch.folder)
        seen.belongings = before, belongings.answers()
        seen.exit_code = server.process.poll()
    return seen


def _take_turns(seen: Seen, watch: Watch, attacker: Attacker, other: Other, seconds: float) -> None:
    """Alone, then attacked, as often as there are rounds; an attack that is cut short is the last."""
    idle, folder = watch.memory, watch.folder
    rest = watch.until_calm(other.waiting)
    for number in range(ROUNDS):
        begun_at = time.monotonic()
        watch.for_seconds(seconds / 2)
        if not number:
            # From here on, so that the start is not counted.
            idle, folder = watch.memory, watch.folder
            watch.highest_memory, watch.highest_folder = idle, dict(folder)
        attacked_at = time.monotonic()
        seen.phases.append(Phase(False, begun_at, attacked_at, rest is not None))
        seen.cut_short = _attack(seen, watch, attacker, seconds)
        seen.phases.append(Phase(True, attacked_at, time.monotonic(), rest is not None))
        rest = watch.until_calm(other.waiting)
        seen.rests.append(rest)
        if seen.cut_short:
            break
    seen.memory = idle, watch.highest_memory
    seen.folder = folder, watch.highest_folder, {}


def _attack(seen: Seen, watch: Watch, attacker: Attacker, seconds: float) -> str:
    """One phase of it; says why it was cut short, if it was."""
    deadline = time.monotonic() + seconds + _GRACE
    attacker.begin(seconds)
    while not attacker.is_done(EVERY):
        watch.look()
        if is_machine_full() or time.monotonic() > deadline:
            attacker.end()
            return "the machine's memory was nearly full" if is_machine_full() else "the attack did not end in time"
    watch.look()
    seen.told = attacker.told()
    return ""
