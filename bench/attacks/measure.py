"""The measurement of one attack: a fresh server, phases with and without the attack, and the observations."""

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from bench.attacks import ATTACKER, OTHER, ROUNDS, SWEEP_SECONDS
from bench.attacks.attacker import Attack, Attacker, Responses, attacking
from bench.attacks.hosting import hosting
from bench.attacks.victim import SUBMIT, Operation, OtherKey, running_other_key
from bench.attacks.watch import EVERY, Watch, is_machine_full
from tests.support.server_process import serving, wait_until_completed

MODELS = Path(__file__).parent / "models"
#: Seconds that a phase with the attack may last beyond its planned end.
_GRACE = 10.0
#: The content of the other key's upload, which should survive the attack.
_UPLOAD_CONTENT = bytes(1_000_000)


@dataclass(frozen=True)
class Phase:
    """A period of time, by the monotonic clock."""

    is_attacked: bool
    begun_at: float
    ended_at: float
    #: Whether the server was at rest before this phase or, for a phase with the attack, before the phase preceding it.
    is_calm: bool

    def has(self, operation: Operation) -> bool:
        """Return whether the operation started in this phase."""
        return self.begun_at <= operation.begun_at < self.ended_at


@dataclass
class Seen:
    """The observations of one attack."""

    phases: list[Phase] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    responses: Responses = field(default_factory=Responses)
    #: Seconds from the end of each phase with the attack until the server was at rest; None if it did not rest in time.
    rests: list[float | None] = field(default_factory=list)
    #: The reason why the attack ended early; empty if it did not.
    cut_short: str = ""
    #: Resident memory in bytes: idle, and the maximum under attack.
    memory: tuple[int, int] = (0, 0)
    #: Bytes in the data directory: before the attack, the maximum, and after a sweep.
    directory_bytes: tuple[dict[str, int], dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}, {}))
    #: The status, or the name of the error, of a GET for each of the other key's belongings: before the attack, and
    #: after the last sweep.
    belongings: tuple[dict[str, str], dict[str, str]] = field(default_factory=lambda: ({}, {}))
    #: Exit code of the server if it ended during the attack.
    exit_code: int | None = None


class _Belongings:
    """The data that the other key stores before the attack: a finished request, its image, and an uploaded file."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        submitted = client.post("/queue/bench/null", content=SUBMIT).raise_for_status().json()
        wait_until_completed(client, submitted["status_url"])
        self.status_path = urlsplit(submitted["status_url"]).path
        image_url = client.get(submitted["response_url"]).json()["images"][0]["url"]
        self._urls = {"result": submitted["response_url"], "image": image_url}
        uploaded = client.post("/files/upload", content=_UPLOAD_CONTENT, headers={"content-type": "image/png"})
        # With a rate limit of one request a day, the upload may be refused.
        if uploaded.status_code == 200:
            self._urls["upload"] = uploaded.json()["access_url"]

    def statuses(self) -> dict[str, str]:
        """Send a GET for each of the belongings; return the status, or the name of the error, of each."""
        return {name: self._status(url) for name, url in self._urls.items()}

    def _status(self, url: str) -> str:
        try:
            return str(self._client.get(url).status_code)
        except httpx.TransportError as error:
            return type(error).__name__


def measure(attack: Attack, seconds: float) -> Seen:
    """Run the attack, in phases of at most `seconds`; return the observations."""
    settings = {"models_dir": str(MODELS), "keys": f"{ATTACKER},{OTHER}", **attack.settings}
    seen = Seen()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        hosted_dir, data_dir = Path(name) / "hosted", Path(name) / "data"
        hosted_dir.mkdir()
        server = stack.enter_context(serving(data_dir, "bench/null=demo", **settings))
        url = server.ready().url
        port = urlsplit(url).port or 0
        hosted_url = stack.enter_context(hosting(hosted_dir))
        attacker = stack.enter_context(attacking(attack.prepare, port, hosted_dir, hosted_url))
        headers = {"authorization": f"Key {OTHER}"}
        client = stack.enter_context(httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False))
        belongings = _Belongings(client)
        before = belongings.statuses()
        other = stack.enter_context(running_other_key(port, attack.operations, belongings.status_path))
        watch = Watch(server.process.pid, data_dir)
        _run_phases(seen, watch, attacker, other, seconds)
        attacker.end()
        seen.operations = other.stop()
        watch.until_swept(SWEEP_SECONDS)
        seen.directory_bytes = (*seen.directory_bytes[:2], watch.directory_bytes)
        seen.belongings = before, belongings.statuses()
        seen.exit_code = server.process.poll()
    return seen


def _run_phases(seen: Seen, watch: Watch, attacker: Attacker, other: OtherKey, seconds: float) -> None:
    """Alternate phases without and with the attack, ROUNDS times. A phase that is cut short is the last one."""
    idle, directory_bytes = watch.memory, watch.directory_bytes
    rest_seconds = watch.until_calm(other.waiting)
    for round_index in range(ROUNDS):
        begun_at = time.monotonic()
        watch.for_seconds(seconds / 2)
        if not round_index:
            # Measure from here on, so that the start of the server does not count.
            idle, directory_bytes = watch.memory, watch.directory_bytes
            watch.highest_memory, watch.highest_directory_bytes = idle, dict(directory_bytes)
        attacked_at = time.monotonic()
        seen.phases.append(Phase(False, begun_at, attacked_at, rest_seconds is not None))
        seen.cut_short = _run_attack(seen, watch, attacker, seconds)
        seen.phases.append(Phase(True, attacked_at, time.monotonic(), rest_seconds is not None))
        rest_seconds = watch.until_calm(other.waiting)
        seen.rests.append(rest_seconds)
        if seen.cut_short:
            break
    seen.memory = idle, watch.highest_memory
    seen.directory_bytes = directory_bytes, watch.highest_directory_bytes, {}


def _run_attack(seen: Seen, watch: Watch, attacker: Attacker, seconds: float) -> str:
    """Run one phase with the attack; return the reason why it was cut short, or an empty string."""
    deadline = time.monotonic() + seconds + _GRACE
    attacker.begin(seconds)
    while not attacker.is_done(EVERY):
        watch.look()
        if is_machine_full() or time.monotonic() > deadline:
            attacker.end()
            return "the machine's memory was nearly full" if is_machine_full() else "the attack did not end in time"
    watch.look()
    seen.responses = attacker.responses()
    return ""
