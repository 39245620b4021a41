"""`make peers` compares servers, so both sides must use the same versions of the packages they share."""

import pytest

from tests.support.server_process import ROOT


def versions(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize(
    "package", ["fastapi", "starlette", "uvicorn", "uvloop", "httptools", "pydantic", "pydantic_core", "pillow"]
)
def test_both_sides_have_the_same_version(package: str) -> None:
    assert versions("bench/peer_servers/requirements.txt")[package] == versions("constraints/packages.txt")[package]
