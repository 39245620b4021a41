"""Cancel in every state and at every step: at most one more step runs, and no job is both cancelled and completed."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.components import open_components
from tests.support.server_process import TEST_MODELS, Gate, open_gate, serving, statuses, wait_until_claimed

QUEUED = "/queue/test/gate"
OK, REQUESTED, TOO_LATE = 200, 202, 400


@dataclass(frozen=True)
class Plan:
    """The moment at which a request is cancelled: after `moment` steps.

    -1 means while the request waits, `total` at an unknown time, and more than `total` after the request has completed.
    """

    number: int
    num_steps: int
    num_images: int
    moment: int

    @property
    def total(self) -> int:
        """Return the number of steps of all images."""
        return self.num_steps * self.num_images

    @property
    def is_a_race(self) -> bool:
        """Return whether the progress is unknown when the cancel request arrives."""
        return self.moment == self.total


def planned(number: int) -> Plan:
    """Return a plan with random numbers of steps and images; `number` seeds them.

    The plans of many successive numbers together cancel in every state and at every step.
    """
    rng = random.Random(number)
    num_steps, num_images = rng.randint(1, 4), rng.randint(1, 2)
    return Plan(number, num_steps, num_images, number % (num_steps * num_images + 3) - 1)


def submitted(client: httpx.Client, gate: Gate, num_steps: int, num_images: int = 1) -> str:
    """Submit a request that waits at the gate before each step; return its path."""
    body = {"prompt": str(gate.path), "num_inference_steps": num_steps, "num_images": num_images}
    return str(httpx.URL(client.post(QUEUED, json=body).json()["response_url"]).path)


def new_steps(status: dict[str, Any]) -> int:
    """Count the steps that this event is the first to report."""
    return sum(line["message"].startswith("step ") for line in status["logs"] or [])


def followed(client: httpx.Client, path: str) -> tuple[dict[str, Any], int]:
    """Follow a request to its end; return its last status and the number of steps in its log."""
    steps, last = 0, dict[str, Any]()
    for last in statuses(client, f"{path}/status"):
        steps += new_steps(last)
    return last, steps


def reach(client: httpx.Client, path: str, plan: Plan, gate: Gate) -> None:
    """Let a request proceed to the moment of the plan. Then it waits for its next step, is running, or is done."""
    gate.release(min(plan.moment, plan.total))
    if plan.is_a_race:
        for _ in range(plan.number % 5):
            client.get(f"{path}/status")
    elif plan.moment > plan.total:
        followed(client, path)
    else:
        wait_until_claimed(client, f"{path}/status")
        steps = 0
        for status in statuses(client, f"{path}/status") if plan.moment else ():
            steps += new_steps(status)
            if steps >= plan.moment:
                break


def cancel_and_judge(client: httpx.Client, plan: Plan, gate: Gate, holder: str | None) -> None:
    """Cancel one request at its moment, and check that the answer to the cancel request matches how the job ends."""
    path = submitted(client, gate, plan.num_steps, plan.num_images)
    if holder is None:
        reach(client, path, plan, gate)
    answer = client.put(f"{path}/cancel").status_code
    # Let the current step finish: that of this request or, if there is a holder, that of the holder, which runs first.
    gate.release(1)
    status, steps = followed(client, path)
    result = client.get(path)
    expected = OK if holder else TOO_LATE if plan.moment > plan.total else REQUESTED
    assert answer == expected or (plan.is_a_race and answer in (OK, REQUESTED, TOO_LATE)), plan
    assert result.status_code == (200 if answer == TOO_LATE else 499), (plan, answer)
    assert (status.get("error_type") == "client_cancelled") == (answer != TOO_LATE), (plan, answer, status)
    assert plan.is_a_race or steps <= max(plan.moment, 0) + 1, (plan, steps)
    # A second cancel request is too late and changes nothing.
    assert client.put(f"{path}/cancel").status_code == TOO_LATE, plan
    assert client.get(path).content == result.content, plan


@pytest.mark.parametrize("number", [40, pytest.param(400, marks=pytest.mark.soak)])
def test_a_cancel_at_any_moment(tmp_path: Path, number: int) -> None:
    with (
        serving(tmp_path / "data", TEST_MODELS, max_running="1") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        for plan in map(planned, range(number)):
            with open_gate(tmp_path / f"gate-{plan.number}") as gate:
                holder = submitted(client, gate, 1) if plan.moment < 0 else None
                if holder:
                    wait_until_claimed(client, f"{holder}/status")
                cancel_and_judge(client, plan, gate, holder)
                assert holder is None or followed(client, holder)[0].get("error") is None, plan
        assert server.stop() == 0
    with open_components(tmp_path / "data") as components:
        completed = components.rows("SELECT request_id FROM jobs WHERE status = 200 AND NOT is_cancelled")
        cancelled = components.rows("SELECT request_id FROM jobs WHERE status = 499 AND is_cancelled")
        assert len(completed) + len(cancelled) == components.rows("SELECT count(*) FROM jobs")[0][0]
        # A cancelled request has no image, neither in the database nor on the disk.
        assert set(components.rows("SELECT request_id FROM files")) == set(completed)
        assert components.stored_file_names() == [
            name for (name,) in components.rows("SELECT name FROM files ORDER BY name")
        ]
    print(f"{len(cancelled)} cancelled, {len(completed)} completed")
