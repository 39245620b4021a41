"""The attack program `bench.attacks`: its counts match what happened. The other figures are not tested."""

from dataclasses import replace
from functools import partial

import pytest

from bench.attacks import ROUNDS, bodies, loras, storage
from bench.attacks.__main__ import ATTACKS
from bench.attacks.measure import measure
from bench.attacks.report import figures, line

SECONDS, NUM_FILES = 1.0, 40


def test_each_attack_has_a_unique_name() -> None:
    assert len(ATTACKS) == len([*loras.ATTACKS, *bodies.ATTACKS, *storage.ATTACKS])


@pytest.mark.parametrize("maker", [loras.file_with_metadata, loras.file_with_tensors])
def test_headers_have_the_stated_length(maker: loras.Maker) -> None:
    content = maker(1_000_000, 10_000)
    assert 990_000 < int.from_bytes(content[:8], "little") < 1_010_000


def test_empty_files_are_counted() -> None:
    attack = replace(ATTACKS["empty-files"], prepare=partial(storage.uploads, number=NUM_FILES, content=b""))
    found = figures(attack, measure(attack, SECONDS))
    assert sum(found["attacker_answers"].values()) == NUM_FILES
    accepted = found["attacker_answers"].get("200", 0)
    directory = found["directory_bytes"]
    # Uploads of the other key are created and deleted meanwhile, so the counts are lower bounds.
    assert directory["highest"]["num_files"] >= directory["before"]["num_files"]
    assert directory["after_sweep"]["num_files"] >= accepted
    assert line(found).startswith("empty-files: status ")


def test_held_requests_are_counted_and_the_other_key_is_served() -> None:
    attack = replace(ATTACKS["bodies-60kb"], prepare=partial(bodies.bodies, number=5, length=60_000))
    found = figures(attack, measure(attack, SECONDS))
    assert sum(found["attacker_answers"].values()) == 5 * ROUNDS
    assert found["longest_held_s"] > 0
    assert [phase["is_attacked"] for phase in found["phases"]] == [False, True] * ROUNDS
    for kind in attack.operations:
        assert found["other"][kind]["alone"]["number"] > 0
        assert found["other"][kind]["attacked"]["number"] > 0
    assert found["belongings"]["before"] == dict.fromkeys(("result", "image", "upload"), "200")
