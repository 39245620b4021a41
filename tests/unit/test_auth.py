"""Who is calling."""

import base64
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from server.auth import ANONYMOUS, Keys, KeyScope, add_key, list_keys, load_key_scopes, pepper, revoke_key
from server.errors import Forbidden, Unauthorized
from tests.support.components import Parts, opened

KEY = "id:secret"


@pytest.mark.parametrize("authorization", [None, "", "Key anything", "Basic eDp5", "nonsense"])
def test_without_a_key_everybody_is_one_owner(authorization: str | None) -> None:
    keys = Keys(())
    assert keys.allows_anonymous
    assert keys.owner(authorization) == ANONYMOUS


@pytest.mark.parametrize("authorization", [f"Key {KEY}", f"key {KEY}", f"KEY {KEY}", f"Bearer {KEY}", f"Key  {KEY} "])
def test_the_right_key_is_known_in_every_spelling(authorization: str) -> None:
    keys = Keys((KEY,))
    assert not keys.allows_anonymous
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
    key = add_key(parts.database, "", KeyScope.OPERATOR)
    assert Keys((), load_key_scopes(parts.database), pepper(parts.database)).owner(f"Key {key}")
    everything = b"".join(path.read_bytes() for path in parts.folder.glob("queue.sqlite3*"))
    assert key.encode() not in everything
    assert key.partition(":")[2].encode() not in everything


def test_a_generated_key_is_known_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as parts:
        key = add_key(parts.database, "", KeyScope.OPERATOR)
        owner = Keys((), load_key_scopes(parts.database), pepper(parts.database)).owner(f"Key {key}")
    with opened(tmp_path) as parts:
        assert Keys((), load_key_scopes(parts.database), pepper(parts.database)).owner(f"Bearer {key}") == owner


def test_generated_keys_differ_and_have_two_parts_as_fals_do(parts: Parts) -> None:
    first, second = add_key(parts.database, "", KeyScope.OPERATOR), add_key(parts.database, "", KeyScope.OPERATOR)
    assert first != second
    assert len(first.split(":")) == 2


def test_given_and_generated_keys_are_both_known(parts: Parts) -> None:
    key = add_key(parts.database, "", KeyScope.OPERATOR)
    keys = Keys((KEY,), load_key_scopes(parts.database), pepper(parts.database))
    assert keys.owner(f"Key {KEY}") != keys.owner(f"Key {key}")


def test_named_keys_are_listed_and_revoked(parts: Parts) -> None:
    keys = {
        name: add_key(parts.database, name, scope)
        for name, scope in (("shop", KeyScope.CLIENT), ("me", KeyScope.OPERATOR))
    }
    known = Keys((), load_key_scopes(parts.database), pepper(parts.database))
    owner = known.owner(f"Key {keys['shop']}")
    assert {each["name"]: each["scope"] for each in list_keys(parts.database)} == {"shop": "client", "me": "operator"}
    assert list_keys(parts.database)[0]["owner"] == owner[:9]
    assert keys["shop"] not in str(list_keys(parts.database))
    known.require_operator(f"Key {keys['me']}")
    with pytest.raises(Forbidden):
        known.require_operator(f"Key {keys['shop']}")
    revoke_key(parts.database, "shop")
    known.reload(load_key_scopes(parts.database))
    with pytest.raises(Unauthorized):
        known.owner(f"Key {keys['shop']}")
    assert known.owner(f"Key {keys['me']}")


def test_a_client_does_not_become_the_operator_when_that_is_revoked(parts: Parts) -> None:
    keys = {
        name: add_key(parts.database, name, scope)
        for name, scope in (("shop", KeyScope.CLIENT), ("me", KeyScope.OPERATOR))
    }
    known = Keys((), load_key_scopes(parts.database), pepper(parts.database))
    revoke_key(parts.database, "me")
    known.reload(load_key_scopes(parts.database))
    with pytest.raises(Forbidden):
        known.require_operator(f"Key {keys['shop']}")


def test_revoking_the_last_key_opens_nothing(parts: Parts) -> None:
    add_key(parts.database, "only", KeyScope.CLIENT)
    known = Keys((), load_key_scopes(parts.database), pepper(parts.database))
    revoke_key(parts.database, list_keys(parts.database)[0]["owner"])
    known.reload(load_key_scopes(parts.database))
    assert not known.allows_anonymous
    with pytest.raises(Unauthorized):
        known.owner(None)


def test_names_stand_for_one_key(parts: Parts) -> None:
    add_key(parts.database, "shop", KeyScope.CLIENT)
    with pytest.raises(ValueError, match="named shop already"):
        add_key(parts.database, "shop", KeyScope.CLIENT)
    for name in ("", "nobody", "0", "%"):
        with pytest.raises(ValueError, match="There is no key"):
            revoke_key(parts.database, name)
    assert len(list_keys(parts.database)) == 1


# -- tokens


def issued(keys: Keys, scope: str = "flux", seconds: float = 60) -> tuple[str, str]:
    """A token, and whose it is."""
    owner = keys.owner(f"Key {KEY}")
    return keys.issue(owner, scope, seconds), owner


def is_refused(keys: Keys, token: str, scope: str = "flux") -> bool:
    """Whether a token is good for nothing of this scope."""
    with pytest.raises(Unauthorized):
        keys.owner_of_token(token, scope)
    with pytest.raises(Unauthorized):
        keys.owner(f"Bearer {token}", scope)
    return True


@pytest.mark.parametrize("scope", ["flux", "flux null", "null flux"])
def test_a_token_stands_for_its_key_in_its_scope(scope: str) -> None:
    keys = Keys((KEY,))
    token, owner = issued(keys, scope)
    assert keys.owner_of_token(token, "flux") == owner
    assert keys.owner(f"Bearer {token}", "flux") == keys.owner(f"bearer  {token} ", "flux") == owner


def test_a_token_is_good_for_nothing_else() -> None:
    keys = Keys((KEY,))
    token, _ = issued(keys, "flux null")
    for scope in ("uploads", "", "flu", "flux null", "fluxx"):
        assert is_refused(keys, token, scope)
    for authorization in (f"Bearer {token}", f"Key {token}"):
        with pytest.raises(Unauthorized):
            keys.owner(authorization)
    with pytest.raises(Unauthorized):
        keys.owner(f"Key {token}", "flux")


def test_a_key_is_good_in_every_scope_and_no_token() -> None:
    keys = Keys((KEY,))
    assert keys.owner(f"Bearer {KEY}", "flux") == keys.owner(f"Key {KEY}", "uploads") == keys.owner(f"Key {KEY}")
    with pytest.raises(Unauthorized):
        keys.owner_of_token(KEY, "flux")


def test_a_token_ends() -> None:
    keys = Keys((KEY,))
    assert is_refused(keys, issued(keys, seconds=-1)[0])
    assert is_refused(keys, issued(keys, seconds=-3600)[0])


def test_a_token_dies_with_its_key(parts: Parts) -> None:
    key = add_key(parts.database, "shop", KeyScope.CLIENT)
    keys = Keys((KEY,), load_key_scopes(parts.database), pepper(parts.database))
    owner = keys.owner(f"Key {key}")
    token, other = keys.issue(owner, "flux", 60), issued(keys)[0]
    assert keys.owner_of_token(token, "flux") == owner
    revoke_key(parts.database, "shop")
    keys.reload(load_key_scopes(parts.database))
    assert is_refused(keys, token)
    assert not keys.is_active(owner)
    assert keys.owner_of_token(other, "flux") == keys.owner(f"Key {KEY}")


def test_a_token_dies_with_the_process() -> None:
    assert is_refused(Keys((KEY,)), issued(Keys((KEY,)))[0])


def _part(value: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def test_a_forged_token_is_refused() -> None:
    keys = Keys((KEY,))
    token, owner = issued(keys)
    header, claims, signature = token.split(".")
    wanted = {"sub": owner, "scope": "uploads flux", "exp": int(time.time()) + 3600}
    forged = [
        f"{header}.{_part(wanted)}.{signature}",
        f"{_part({'alg': 'none', 'typ': 'JWT'})}.{_part(wanted)}.",
        f"{header}.{claims}.",
        f"{header}.{claims}",
        f"{header}.{claims}.{signature[:-2]}",
        jwt.encode(wanted, "another secret, as long as a secret should be", "HS256"),
        jwt.encode(wanted, KEY.ljust(32), "HS256"),
        jwt.encode(wanted, owner, "HS256"),
        "",
        "..",
        "é",
        "nonsense",
    ]
    assert all(is_refused(keys, one) for one in forged)


def test_a_token_does_not_tell_the_key() -> None:
    claims = jwt.decode(issued(Keys((KEY,)))[0], options={"verify_signature": False})
    assert not {KEY, *KEY.split(":")} & {str(value) for value in claims.values()}
    assert "secret" not in str(claims)


@pytest.mark.parametrize("token", ["", "nonsense", "a.b.c"])
def test_without_a_key_every_token_is_everybodys(token: str) -> None:
    keys = Keys(())
    assert keys.owner_of_token(token, "flux") == keys.owner(f"Bearer {token}", "flux") == ANONYMOUS
    assert keys.owner_of_token(keys.issue(ANONYMOUS, "flux", 60), "uploads") == ANONYMOUS
    assert keys.is_active(ANONYMOUS)
