"""Server-side request forgery: in a network where every IP address answers, no forbidden packet leaves the server."""

from typing import Any

import pytest

from tests.support.network import PUBLIC, RESOLVER, run_in_network
from tests.support.network_programs import BY_NAME, CORPUS, WAYS

#: How `TrafficRecorder.attempts` reports the DNS lookups of names, allowed or forbidden.
LOOKED_UP = f"udp {RESOLVER} 53"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_in_network("hostile", tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def allowed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_in_network("allowed", tmp_path_factory.mktemp("allowed"))


def test_the_corpus_has_at_least_sixty_urls() -> None:
    assert len(CORPUS) == len(set(CORPUS)) >= 60


@pytest.mark.parametrize("way", WAYS)
def test_each_url_is_refused(hostile: Any, way: str) -> None:
    # The host name of a webhook is looked up at delivery.
    refused_later = BY_NAME if way == "webhook" else []
    assert hostile["ends"][way] == {url: "ForbiddenURL" if url in refused_later else 422 for url in CORPUS}


def test_a_name_that_later_resolves_to_a_private_address_is_looked_up_once(hostile: Any) -> None:
    assert hostile["ends"]["rebinding"] == {"first": 200, "second": 422}


def test_no_private_address_is_contacted(hostile: Any) -> None:
    """Check every port, open or not. Only the public host is contacted, which redirects to all private addresses."""
    assert set(hostile["tried"]) == {f"tcp {PUBLIC} 80", LOOKED_UP}
    addresses = [line.split()[1] for line in hostile["asked"]]
    assert len(addresses) > 2 * len(CORPUS)
    assert set(addresses) == {PUBLIC}


def test_allowed_requests_are_observed(allowed: Any) -> None:
    """Contact the same addresses, which shows that the tests above would have observed forbidden requests."""
    assert set(allowed["ends"].values()) == {200}
    tried = {line.split()[1] for line in allowed["tried"]} - {PUBLIC, RESOLVER}
    private = {"127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "169.254.169.254", "192.0.0.192"}
    assert tried >= {*private, "::1", "fd00::1", "fec0::1", "fd00:ec2::254", "64:ff9b::7f00:1", "2002:7f00:1::"}
    files = {"GET 10.0.0.1 /image.png", "GET 192.168.0.1 /lora.safetensors", "POST 169.254.169.254 /hook"}
    assert set(allowed["asked"]) > files


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_in_network("local", tmp_path_factory.mktemp("local"))


def test_local_weights_are_used_without_network_access(local: Any) -> None:
    """Use weights of the demo, of a directory and of the hub's cache; no name is looked up either."""
    assert [end.get("has_nsfw_concepts", end) for end in local["ends"].values()] == [[False]] * 3
    assert local["tried"] == []
    # These packets show that the network was observed.
    assert set(local["after"]) == {f"tcp {PUBLIC} 80", LOOKED_UP}
