"""What leaves the server, seen on the wire of a network where every address answers: nothing that must not."""

from typing import Any

import pytest

from tests.support.network import PUBLIC, RESOLVER, inside
from tests.support.network_programs import BY_NAME, CORPUS, WAYS

#: Where the names of good hosts and of bad ones are asked for.
LOOKED_UP = f"udp {RESOLVER} 53"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return inside("hostile", tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def allowed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return inside("allowed", tmp_path_factory.mktemp("allowed"))


def test_there_are_as_many_as_were_asked_for() -> None:
    assert len(CORPUS) == len(set(CORPUS)) >= 60


@pytest.mark.parametrize("way", WAYS)
def test_each_is_refused(hostile: Any, way: str) -> None:
    # A webhook's name is looked up when it is delivered.
    later = BY_NAME if way == "webhook" else []
    assert hostile["ends"][way] == {url: "ForbiddenURL" if url in later else 422 for url in CORPUS}


def test_a_name_that_is_inner_at_the_second_look_is_looked_up_once(hostile: Any) -> None:
    assert hostile["ends"]["rebinding"] == {"first": 200, "second": 422}


def test_nothing_inner_is_turned_to(hostile: Any) -> None:
    """Not on any port, whether somebody listens or not. The public host is, for it sends on to all of them."""
    assert set(hostile["tried"]) == {f"tcp {PUBLIC} 80", LOOKED_UP}
    asked = [line.split()[1] for line in hostile["asked"]]
    assert len(asked) > 2 * len(CORPUS)
    assert set(asked) == {PUBLIC}


def test_who_is_allowed_to_is_heard(allowed: Any) -> None:
    """By the very same addresses, so that the silence above means something."""
    assert set(allowed["ends"].values()) == {200}
    tried = {line.split()[1] for line in allowed["tried"]} - {PUBLIC, RESOLVER}
    inner = {"127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "169.254.169.254", "192.0.0.192"}
    assert tried >= {*inner, "::1", "fd00::1", "fec0::1", "fd00:ec2::254", "64:ff9b::7f00:1", "2002:7f00:1::"}
    files = {"GET 10.0.0.1 /picture.png", "GET 192.168.0.1 /lora.safetensors", "POST 169.254.169.254 /hook"}
    assert set(allowed["asked"]) > files


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return inside("local", tmp_path_factory.mktemp("local"))


def test_weights_that_are_here_are_loaded_and_painted_without_a_word_to_anybody(local: Any) -> None:
    """Those of the demo, of a folder, and of the hub's cache; no name is looked up either."""
    assert [end.get("has_nsfw_concepts", end) for end in local["ends"].values()] == [[False]] * 3
    assert local["tried"] == []
    # The wire was listened to.
    assert set(local["after"]) == {f"tcp {PUBLIC} 80", LOOKED_UP}
