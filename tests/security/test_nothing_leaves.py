"""Programs that call fal's hosts under `flux-server run`, in a network where every address of the world answers."""

from pathlib import Path
from typing import Any

import pytest

from tests.clients.test_node_clients import node as node
from tests.support.network import inside
from tests.support.network_programs import FAL_NAMES

PROGRAMS = ["node", "python"]


def host_of(way: str) -> str:
    return way.rpartition(" ")[2]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_name_of_fal_is_answered_here(node: None, tmp_path: Path, program: str) -> None:
    said = inside("turned_to_fal", tmp_path, program, "running")
    assert said["tried"] == ["tcp 127.0.0.1"]
    answers: dict[str, dict[str, Any]] = said["answers"]
    assert {host_of(way) for way in answers} == set(FAL_NAMES)
    failed = {way: answer["failed"] for way, answer in answers.items() if "failed" in answer}
    # A tunnel to a name that no certificate can bear is refused, and says so, before there is anything to answer.
    assert {host_of(way) for way in failed} <= {"far.too.deep.fal.media"}
    assert program == "python" or not failed
    assert {answer["status"] for answer in answers.values() if "status" in answer} <= {403, 404}
    # What a refused WebSocket is told, its clients keep to themselves.
    told = {way: answer["text"] for way, answer in answers.items() if answer.get("text")}
    assert not [way for way, text in told.items() if "not offered by this server" not in text]
    assert len(told) > len(answers) / 2


@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_of_it_leaves_when_the_server_is_stopped(node: None, tmp_path: Path, program: str) -> None:
    said = inside("turned_to_fal", tmp_path, program, "stopped")
    assert said["tried"] == ["tcp 127.0.0.1"]
    assert not {way: answer for way, answer in said["answers"].items() if "failed" not in answer}
