"""Tests of the settings of --testing."""

from server.cli.testing import with_testing_defaults
from server.settings import Settings


def outbound_allow(**options: object) -> tuple[str, ...]:
    """Return the private networks that a server for tests with these settings may reach."""
    return with_testing_defaults(Settings.load({}, {"testing": True, **options})).outbound_allow


def test_webhooks_reach_this_machine_only_if_clients_are_on_it() -> None:
    assert "127.0.0.0/8" in outbound_allow()
    assert outbound_allow(outbound_allow="a.example") == ("a.example", *outbound_allow())
    assert outbound_allow(host="0.0.0.0", keys="ci:secret") == ()
    assert outbound_allow(trusted_proxies="10.0.0.0/8") == ()
