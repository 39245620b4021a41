"""Who is calling."""

from pathlib import Path

import pytest

from server.auth import EVERYBODY, Keys, generate, stored_hashes
from server.errors import Unauthorized
from tests.parts import Parts, opened

KEY = "id:secret"


@pytest.mark.parametrize("authorization", [None, "", "Key anything", "Basic eDp5", "nonsense"])
def test_without_a_key_everybody_is_one_owner(authorization: str | None) -> None:
    keys = Keys(())
    assert keys.is_open
    assert keys.owner(authorization) == EVERYBODY


@pytest.mark.parametrize("authorization", [f"Key {KEY}", f"key {KEY}", f"KEY {KEY}", f"Bearer {KEY}", f"Key  {KEY} "])
def test_the_right_key_is_known_in_every_spelling(authorization: str) -> None:
    keys = Keys((KEY,))
    assert not keys.is_open
    assert keys.owner(authorization) == keys.owner(f"Key {KEY}")


WRONG = [
    None,
    "",
    "Key",
    "Key ",
    "Key wrong",
    KEY,
    f"Basic {KEY}",
    f"Key {KEY}x",
    f"Key {KEY[:-1]}",
    f"Key{KEY}",
    "Key é",
]


@pytest.mark.parametrize("authorization", WRONG)
def test_anything_else_is_refused(authorization: str | None) -> None:
    with pytest.raises(Unauthorized) as refused:
        Keys((KEY,)).owner(authorization)
    assert refused.value.status == 401
    assert KEY not in str(refused.value.body)


def test_a_request_belongs_to_the_key_that_made_it() -> None:
    keys = Keys(("alice", "bob"))
    assert keys.owner("Key alice") != keys.owner("Key bob")
    assert keys.owner("Key alice") == Keys(("bob", "alice")).owner("Bearer alice")


def test_an_owner_does_not_tell_the_key() -> None:
    assert "alice" not in Keys(("alice",)).owner("Key alice")


def test_a_generated_key_is_kept_as_its_hash_alone(parts: Parts) -> None:
    key = generate(parts.database)
    assert Keys((), stored_hashes(parts.database)).owner(f"Key {key}")
    everything = b"".join(path.read_bytes() for path in parts.folder.glob("queue.sqlite3*"))
    assert key.encode() not in everything
    assert key.partition(":")[2].encode() not in everything


def test_a_generated_key_is_known_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as parts:
        key = generate(parts.database)
        owner = Keys((), stored_hashes(parts.database)).owner(f"Key {key}")
    with opened(tmp_path) as parts:
        assert Keys((), stored_hashes(parts.database)).owner(f"Bearer {key}") == owner


def test_generated_keys_differ_and_have_two_parts_as_fals_do(parts: Parts) -> None:
    first, second = generate(parts.database), generate(parts.database)
    assert first != second
    assert len(first.split(":")) == 2


def test_given_and_generated_keys_are_both_known(parts: Parts) -> None:
    key = generate(parts.database)
    keys = Keys((KEY,), stored_hashes(parts.database))
    assert keys.owner(f"Key {KEY}") != keys.owner(f"Key {key}")
