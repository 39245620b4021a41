"""Programs that call fal's hosts under `flux-server run`, in a network where every IP address answers."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.network import run_in_network
from tests.support.network_programs import FAL_NAMES

PROGRAMS = ["node", "python"]


def host_of(way: str) -> str:
    return way.rpartition(" ")[2]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_host_of_fal_is_answered_locally(node: None, tmp_path: Path, program: str) -> None:
    report = run_in_network("turned_to_fal", tmp_path, program, "running")
    assert report["tried"] == ["tcp 127.0.0.1"]
    answers: dict[str, dict[str, Any]] = report["answers"]
    assert {host_of(way) for way in answers} == set(FAL_NAMES)
    failed = {way: answer["failed"] for way, answer in answers.items() if "failed" in answer}
    # No certificate can hold this name, so the server refuses the tunnel with a message before any request.
    assert {host_of(way) for way in failed} <= {"far.too.deep.fal.media"}
    assert program == "python" or not failed
    assert {answer["status"] for answer in answers.values() if "status" in answer} <= {403, 404}
    # WebSocket clients do not show the message of a refusal.
    messages = {way: answer["text"] for way, answer in answers.items() if answer.get("text")}
    assert not [way for way, text in messages.items() if "not offered by this server" not in text]
    assert len(messages) > len(answers) / 2


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_call_leaves_when_the_server_is_stopped(node: None, tmp_path: Path, program: str) -> None:
    report = run_in_network("turned_to_fal", tmp_path, program, "stopped")
    assert report["tried"] == ["tcp 127.0.0.1"]
    assert not {way: answer for way, answer in report["answers"].items() if "failed" not in answer}
