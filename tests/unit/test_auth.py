"""Tests of API keys and tokens: which of them the server accepts, and to whom they belong."""

import base64
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from server.auth import ANONYMOUS, Keys, KeyScope, add_key, list_keys, load_key_scopes, pepper, revoke_key
from server.errors import Forbidden, Unauthorized
from tests.support.components import Components, open_components

KEY = "id:secret"


@pytest.mark.parametrize("authorization", [None, "", "Key anything", "Basic eDp5", "nonsense"])
def test_without_keys_all_callers_are_one_owner(authorization: str | None) -> None:
    keys = Keys(())
    assert keys.allows_anonymous
    assert keys.owner(authorization) == ANONYMOUS


def test_clients_of_a_server_without_keys_can_be_separated() -> None:
    keys = Keys((), separates_clients=True)
    assert keys.allows_anonymous
    one, two = keys.owner("Key one"), keys.owner("Bearer two")
    assert len({one, two, ANONYMOUS}) == 3
    assert keys.owner("Bearer one") == one
    assert keys.owner(None) == keys.owner("Key ") == ANONYMOUS
    assert keys.owner_of_token(keys.issue(one, "flux", 60), "flux") == one
    keys.require_operator("Key one")


@pytest.mark.parametrize("authorization", [f"Key {KEY}", f"key {KEY}", f"KEY {KEY}", f"Bearer {KEY}", f"Key  {KEY} "])
def test_a_valid_key_is_accepted_in_every_spelling(authorization: str) -> None:
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
def test_anything_else_is_rejected(authorization: str | None) -> None:
    with pytest.raises(Unauthorized) as error:
        Keys((KEY,)).owner(authorization)
    assert error.value.status == 401
    assert KEY not in str(error.value.body)


def test_a_request_belongs_to_the_key_that_made_it() -> None:
    keys = Keys(("alice", "bob"))
    assert keys.owner("Key alice") != keys.owner("Key bob")
    assert keys.owner("Key alice") == Keys(("bob", "alice")).owner("Bearer alice")


def test_an_owner_does_not_reveal_the_key() -> None:
    assert "alice" not in Keys(("alice",)).owner("Key alice")


def test_only_the_hash_of_a_generated_key_is_stored(components: Components) -> None:
    key = add_key(components.database, "", KeyScope.OPERATOR)
    assert Keys((), load_key_scopes(components.database), pepper(components.database)).owner(f"Key {key}")
    stored = b"".join(path.read_bytes() for path in components.data_dir.glob("queue.sqlite3*"))
    assert key.encode() not in stored
    assert key.partition(":")[2].encode() not in stored


def test_a_generated_key_is_accepted_after_a_restart(tmp_path: Path) -> None:
    with open_components(tmp_path) as components:
        key = add_key(components.database, "", KeyScope.OPERATOR)
        owner = Keys((), load_key_scopes(components.database), pepper(components.database)).owner(f"Key {key}")
    with open_components(tmp_path) as components:
        assert (
            Keys((), load_key_scopes(components.database), pepper(components.database)).owner(f"Bearer {key}") == owner
        )


def test_generated_keys_differ_and_have_two_parts_like_fals_keys(components: Components) -> None:
    first, second = (
        add_key(components.database, "", KeyScope.OPERATOR),
        add_key(components.database, "", KeyScope.OPERATOR),
    )
    assert first != second
    assert len(first.split(":")) == 2


def test_configured_and_generated_keys_are_both_accepted(components: Components) -> None:
    key = add_key(components.database, "", KeyScope.OPERATOR)
    keys = Keys((KEY,), load_key_scopes(components.database), pepper(components.database))
    assert keys.owner(f"Key {KEY}") != keys.owner(f"Key {key}")


def test_named_keys_are_listed_and_revoked(components: Components) -> None:
    keys = {
        name: add_key(components.database, name, scope)
        for name, scope in (("shop", KeyScope.CLIENT), ("me", KeyScope.OPERATOR))
    }
    known = Keys((), load_key_scopes(components.database), pepper(components.database))
    owner = known.owner(f"Key {keys['shop']}")
    assert {each["name"]: each["scope"] for each in list_keys(components.database)} == {
        "shop": "client",
        "me": "operator",
    }
    assert list_keys(components.database)[0]["owner"] == owner[:9]
    assert keys["shop"] not in str(list_keys(components.database))
    known.require_operator(f"Key {keys['me']}")
    with pytest.raises(Forbidden):
        known.require_operator(f"Key {keys['shop']}")
    revoke_key(components.database, "shop")
    known.reload(load_key_scopes(components.database))
    with pytest.raises(Unauthorized):
        known.owner(f"Key {keys['shop']}")
    assert known.owner(f"Key {keys['me']}")


def test_a_client_does_not_become_the_operator_when_the_operators_key_is_revoked(components: Components) -> None:
    keys = {
        name: add_key(components.database, name, scope)
        for name, scope in (("shop", KeyScope.CLIENT), ("me", KeyScope.OPERATOR))
    }
    known = Keys((), load_key_scopes(components.database), pepper(components.database))
    revoke_key(components.database, "me")
    known.reload(load_key_scopes(components.database))
    with pytest.raises(Forbidden):
        known.require_operator(f"Key {keys['shop']}")


def test_revoking_the_last_key_does_not_open_the_server(components: Components) -> None:
    add_key(components.database, "only", KeyScope.CLIENT)
    known = Keys((), load_key_scopes(components.database), pepper(components.database))
    revoke_key(components.database, list_keys(components.database)[0]["owner"])
    known.reload(load_key_scopes(components.database))
    assert not known.allows_anonymous
    with pytest.raises(Unauthorized):
        known.owner(None)


def test_a_name_belongs_to_one_key(components: Components) -> None:
    add_key(components.database, "shop", KeyScope.CLIENT)
    with pytest.raises(ValueError, match="named shop already"):
        add_key(components.database, "shop", KeyScope.CLIENT)
    for name in ("", "nobody", "0", "%"):
        with pytest.raises(ValueError, match="There is no key"):
            revoke_key(components.database, name)
    assert len(list_keys(components.database)) == 1


# -- tokens


def issue_token(keys: Keys, scope: str = "flux", seconds: float = 60) -> tuple[str, str]:
    """Issue a token, and return the token and its owner."""
    owner = keys.owner(f"Key {KEY}")
    return keys.issue(owner, scope, seconds), owner


def is_rejected(keys: Keys, token: str, scope: str = "flux") -> bool:
    """Assert that the token is rejected in this scope, and return True."""
    with pytest.raises(Unauthorized):
        keys.owner_of_token(token, scope)
    with pytest.raises(Unauthorized):
        keys.owner(f"Bearer {token}", scope)
    return True


@pytest.mark.parametrize("scope", ["flux", "flux null", "null flux"])
def test_a_token_stands_for_its_key_in_its_scope(scope: str) -> None:
    keys = Keys((KEY,))
    token, owner = issue_token(keys, scope)
    assert keys.owner_of_token(token, "flux") == owner
    assert keys.owner(f"Bearer {token}", "flux") == keys.owner(f"bearer  {token} ", "flux") == owner


def test_a_token_is_valid_for_nothing_else() -> None:
    keys = Keys((KEY,))
    token, _ = issue_token(keys, "flux null")
    for scope in ("uploads", "", "flu", "flux null", "fluxx"):
        assert is_rejected(keys, token, scope)
    for authorization in (f"Bearer {token}", f"Key {token}"):
        with pytest.raises(Unauthorized):
            keys.owner(authorization)
    with pytest.raises(Unauthorized):
        keys.owner(f"Key {token}", "flux")


def test_a_key_is_valid_in_every_scope_but_is_not_a_token() -> None:
    keys = Keys((KEY,))
    assert keys.owner(f"Bearer {KEY}", "flux") == keys.owner(f"Key {KEY}", "uploads") == keys.owner(f"Key {KEY}")
    with pytest.raises(Unauthorized):
        keys.owner_of_token(KEY, "flux")


def test_a_token_expires() -> None:
    keys = Keys((KEY,))
    assert is_rejected(keys, issue_token(keys, seconds=-1)[0])
    assert is_rejected(keys, issue_token(keys, seconds=-3600)[0])


def test_a_token_ends_with_its_key(components: Components) -> None:
    key = add_key(components.database, "shop", KeyScope.CLIENT)
    keys = Keys((KEY,), load_key_scopes(components.database), pepper(components.database))
    owner = keys.owner(f"Key {key}")
    token, other = keys.issue(owner, "flux", 60), issue_token(keys)[0]
    assert keys.owner_of_token(token, "flux") == owner
    revoke_key(components.database, "shop")
    keys.reload(load_key_scopes(components.database))
    assert is_rejected(keys, token)
    assert not keys.is_active(owner)
    assert keys.owner_of_token(other, "flux") == keys.owner(f"Key {KEY}")


def test_a_token_ends_with_the_process() -> None:
    assert is_rejected(Keys((KEY,)), issue_token(Keys((KEY,)))[0])


def _part(value: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def test_a_forged_token_is_rejected() -> None:
    keys = Keys((KEY,))
    token, owner = issue_token(keys)
    header, claims, signature = token.split(".")
    forged_claims = {"sub": owner, "scope": "uploads flux", "exp": int(time.time()) + 3600}
    forged = [
        f"{header}.{_part(forged_claims)}.{signature}",
        f"{_part({'alg': 'none', 'typ': 'JWT'})}.{_part(forged_claims)}.",
        f"{header}.{claims}.",
        f"{header}.{claims}",
        f"{header}.{claims}.{signature[:-2]}",
        jwt.encode(forged_claims, "another secret, as long as a secret should be", "HS256"),
        jwt.encode(forged_claims, KEY.ljust(32), "HS256"),
        jwt.encode(forged_claims, owner, "HS256"),
        "",
        "..",
        "é",
        "nonsense",
    ]
    assert all(is_rejected(keys, each) for each in forged)


def test_a_token_does_not_reveal_the_key() -> None:
    claims = jwt.decode(issue_token(Keys((KEY,)))[0], options={"verify_signature": False})
    assert not {KEY, *KEY.split(":")} & {str(value) for value in claims.values()}
    assert "secret" not in str(claims)


@pytest.mark.parametrize("token", ["", "nonsense", "a.b.c"])
def test_without_keys_every_token_is_anonymous(token: str) -> None:
    keys = Keys(())
    assert keys.owner_of_token(token, "flux") == keys.owner(f"Bearer {token}", "flux") == ANONYMOUS
    assert keys.owner_of_token(keys.issue(ANONYMOUS, "flux", 60), "uploads") == ANONYMOUS
    assert keys.is_active(ANONYMOUS)
