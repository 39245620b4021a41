"""Cancel at every state and step: at most one further step, and never both cancelled and completed."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.components import opened
from tests.support.server_process import TEST_MODELS, Gate, gated, in_progress, serving, statuses

QUEUED = "/queue/test/gate"
OK, REQUESTED, TOO_LATE = 200, 202, 400


@dataclass(frozen=True)
class Plan:
    """When a request is cancelled: after so many steps; -1 while it waits, `total` at any time, more when done."""

    number: int
    num_steps: int
    num_images: int
    moment: int

    @property
    def total(self) -> int:
        """All the steps that there are."""
        return self.num_steps * self.num_images

    @property
    def is_a_race(self) -> bool:
        """Whether nobody knows how far it is when the cancel comes."""
        return self.moment == self.total


def planned(number: int) -> Plan:
    """Each state and step in its turn; how many there are by chance."""
    rng = random.Random(number)
    num_steps, num_images = rng.randint(1, 4), rng.randint(1, 2)
    return Plan(number, num_steps, num_images, number % (num_steps * num_images + 3) - 1)


def submitted(client: httpx.Client, gate: Gate, num_steps: int, num_images: int = 1) -> str:
    """A request that waits at the gate before each of its steps; its path."""
    body = {"prompt": str(gate.path), "num_inference_steps": num_steps, "num_images": num_images}
    return str(httpx.URL(client.post(QUEUED, json=body).json()["response_url"]).path)


def new_steps(status: dict[str, Any]) -> int:
    """How many steps an event tells of that none before it did."""
    return sum(line["message"].startswith("step ") for line in status["logs"] or [])


def told(client: httpx.Client, path: str) -> tuple[dict[str, Any], int]:
    """How a request ended, and how many steps its log tells of."""
    steps, last = 0, dict[str, Any]()
    for last in statuses(client, f"{path}/status"):
        steps += new_steps(last)
    return last, steps


def reach(client: httpx.Client, path: str, plan: Plan, gate: Gate) -> None:
    """Bring a request to its moment. It stands before the next step then, or is on its way, or done."""
    gate.let(min(plan.moment, plan.total))
    if plan.is_a_race:
        for _ in range(plan.number % 5):
            client.get(f"{path}/status")
    elif plan.moment > plan.total:
        told(client, path)
    else:
        in_progress(client, f"{path}/status")
        steps = 0
        for status in statuses(client, f"{path}/status") if plan.moment else ():
            steps += new_steps(status)
            if steps >= plan.moment:
                break


def cancel_and_judge(client: httpx.Client, plan: Plan, gate: Gate, holder: str | None) -> None:
    """One request, cancelled at its moment: what the cancel was answered is how it ends."""
    path = submitted(client, gate, plan.num_steps, plan.num_images)
    if holder is None:
        reach(client, path, plan, gate)
    answer = client.put(f"{path}/cancel").status_code
    # The one step under way, or that of the holder.
    gate.let(1)
    status, steps = told(client, path)
    result = client.get(path)
    expected = OK if holder else TOO_LATE if plan.moment > plan.total else REQUESTED
    assert answer == expected or (plan.is_a_race and answer in (OK, REQUESTED, TOO_LATE)), plan
    assert result.status_code == (200 if answer == TOO_LATE else 499), (plan, answer)
    assert (status.get("error_type") == "client_cancelled") == (answer != TOO_LATE), (plan, answer, status)
    assert plan.is_a_race or steps <= max(plan.moment, 0) + 1, (plan, steps)
    # Too late for any more of that, and nothing changes.
    assert client.put(f"{path}/cancel").status_code == TOO_LATE, plan
    assert client.get(path).content == result.content, plan


@pytest.mark.parametrize("many", [40, pytest.param(400, marks=pytest.mark.soak)])
def test_a_cancel_at_any_moment(tmp_path: Path, many: int) -> None:
    with (
        serving(tmp_path / "data", TEST_MODELS, max_running="1") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        for plan in map(planned, range(many)):
            with gated(tmp_path / f"gate-{plan.number}") as gate:
                holder = submitted(client, gate, 1) if plan.moment < 0 else None
                if holder:
                    in_progress(client, f"{holder}/status")
                cancel_and_judge(client, plan, gate, holder)
                assert holder is None or told(client, holder)[0].get("error") is None, plan
        assert server.stop() == 0
    with opened(tmp_path / "data") as parts:
        shown = parts.rows("SELECT request_id FROM jobs WHERE status = 200 AND NOT is_cancelled")
        hidden = parts.rows("SELECT request_id FROM jobs WHERE status = 499 AND is_cancelled")
        assert len(shown) + len(hidden) == parts.rows("SELECT count(*) FROM jobs")[0][0]
        # No picture of what was cancelled, neither listed nor on the disk.
        assert set(parts.rows("SELECT request_id FROM files")) == set(shown)
        assert parts.on_disk() == [name for (name,) in parts.rows("SELECT name FROM files ORDER BY name")]
    print(f"{len(hidden)} cancelled, {len(shown)} completed")
