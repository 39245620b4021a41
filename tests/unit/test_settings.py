"""Tests of settings: they are read once, and all problems are reported at once."""

from pathlib import Path
from typing import Any

import pytest

from server.settings import Settings, SettingsError


def problems(environment: dict[str, str], options: dict[str, Any] | None = None) -> list[str]:
    """Return the problems of these settings, one line each."""
    with pytest.raises(SettingsError) as error:
        Settings.load(environment, options)
    return str(error.value).splitlines()


def test_the_default_is_the_demo_for_this_machine_only() -> None:
    settings = Settings.load({})
    assert (settings.weights, settings.host, settings.port, settings.tls_port) == (("demo",), "127.0.0.1", 8000, 8443)
    assert settings.is_loopback
    assert settings.keys == ()


def test_options_override_the_environment() -> None:
    environment = {"FLUX_SERVER_PORT": "1", "FLUX_SERVER_HOST": "0.0.0.0"}
    settings = Settings.load(environment, {"port": "2", "host": None})
    assert (settings.port, settings.host) == (2, "0.0.0.0")


def test_other_variables_are_ignored() -> None:
    assert Settings.load({"PATH": "/bin", "SERVER_PORT": "9", "flux_server_port": "9"}) == Settings.load({})


def test_every_problem_is_listed_at_once() -> None:
    invalid = {
        "PORT": "many",
        "TLS_PORT": "70000",
        "MAX_RUNNING": "0",
        "DEVICE": "abacus",
        "TRUSTED_PROXIES": "1.2.3.4/99",
    }
    lines = problems({f"FLUX_SERVER_{name}": value for name, value in invalid.items()})
    assert len(lines) == len(invalid)
    for name, value in invalid.items():
        (line,) = [line for line in lines if f"FLUX_SERVER_{name})" in line]
        assert line.startswith(f"--{name.lower().replace('_', '-')} ")
        assert value in line


def test_an_unknown_setting_is_rejected_by_name() -> None:
    (line,) = problems({"FLUX_SERVER_PROT": "1"})
    assert "FLUX_SERVER_PROT" in line and "unknown setting" in line


def test_a_problem_in_an_option_names_the_option() -> None:
    (line,) = problems({}, {"retention_days": "-1"})
    assert line.startswith("--retention-days (FLUX_SERVER_RETENTION_DAYS)")


INVALID = {
    "port": ["-1", "65536", "http"],
    "max_queue_length": ["0"],
    "max_side": ["63", "14143"],
    "max_pixels": ["0"],
    "max_body_mib": ["0"],
    "max_upload_mib": ["0"],
    "max_uploads_gb": ["0", "nan"],
    "proxy_port": ["-1", "65536"],
    "proxy_others": ["perhaps"],
    "exit_with_process": ["-1", "4194305"],
    "retention_days": ["0", "nan"],
    "retention_gb": ["0"],
    "shutdown_grace": ["-1"],
    "enforce_safety_checker": ["perhaps"],
    "public_url": ["fal.example", "ftp://fal.example"],
    "log_level": ["loud"],
    "trusted_proxies": ["a proxy"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in INVALID.items() for value in values])
def test_an_invalid_value_is_rejected(name: str, value: str) -> None:
    assert len(problems({f"FLUX_SERVER_{name.upper()}": value})) == 1


def test_an_empty_variable_means_not_set() -> None:
    settings = Settings.load({"FLUX_SERVER_PORT": "", "FLUX_SERVER_WEIGHTS": "", "FAL_KEY": ""})
    assert (settings.port, settings.weights, settings.keys) == (8000, ("demo",), ())


def test_the_key_that_env_prints_for_a_server_without_keys_is_ignored() -> None:
    assert Settings.load({"FAL_KEY": "local"}).keys == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rate_per_key", "many"),
        ("rate_per_key", "0/minute"),
        ("rate_per_key", "5/fortnight"),
        ("outbound_allow", "10.0.0.0/99"),
        ("outbound_allow", "hooks.lan,!!"),
        ("cors_origin", "foo"),
        ("models_dir", "/nope"),
        ("webhook_secret", "whsec_foo"),
        ("openai_models", "gpt-image-1"),
        ("openai_models", "gpt-image-1=fal-ai/flux/dev,=x"),
    ],
)
def test_values_that_cannot_work_are_rejected(name: str, value: str) -> None:
    assert len(problems({f"FLUX_SERVER_{name.upper()}": value})) == 1


@pytest.mark.parametrize("entry", ["localhost:18110", "http://localhost", "hooks.lan/path", "[::1]:80", "10.0.0.0/99"])
def test_outbound_allow_takes_neither_scheme_nor_port(entry: str) -> None:
    (line,) = problems({"FLUX_SERVER_OUTBOUND_ALLOW": f"10.0.0.0/8,{entry}"})
    assert f"{entry} should be a host, an address or a network, without scheme or port" in line


def test_ports_must_differ() -> None:
    (line,) = problems({"FLUX_SERVER_PORT": "8100", "FLUX_SERVER_TLS_PORT": "8100"})
    assert "should differ" in line


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GPUS": "2"}, "need --ray"),
        ({"MAX_GPUS": "2"}, "need --ray"),
        ({"RAY": "local", "GPUS": "2", "MAX_GPUS": "2"}, "use either --gpus for a fixed number"),
        ({"RAY": "local", "MIN_GPUS": "1"}, "--min-gpus needs --max-gpus"),
        ({"RAY": "local", "MIN_GPUS": "3", "MAX_GPUS": "2"}, "--min-gpus should be at most --max-gpus"),
    ],
)
def test_inconsistent_numbers_of_gpus_are_rejected(environment: dict[str, str], message: str) -> None:
    (line,) = problems({f"FLUX_SERVER_{name}": value for name, value in environment.items()})
    assert message in line


def test_the_connect_proxy_needs_tls() -> None:
    (line,) = problems({"FLUX_SERVER_PROXY_PORT": "8888", "FLUX_SERVER_TLS_PORT": "0"})
    assert "--proxy-port needs --tls-port" in line
    assert Settings.load({"FLUX_SERVER_PROXY_PORT": "8888"}).proxy_port == 8888


def test_lists_are_separated_by_commas() -> None:
    settings = Settings.load({"FLUX_SERVER_KEYS": " a , b,", "FLUX_SERVER_OUTBOUND_ALLOW": "10.0.0.0/8,hooks.lan"})
    assert settings.keys == ("a", "b")
    assert settings.outbound_allow == ("10.0.0.0/8", "hooks.lan")


@pytest.mark.parametrize("value", ["1", "true", "True", "yes", "on"])
def test_true_has_many_spellings(value: str) -> None:
    assert Settings.load({"FLUX_SERVER_ENFORCE_SAFETY_CHECKER": value}).enforce_safety_checker


def test_fal_key_is_one_of_the_keys() -> None:
    assert Settings.load({"FAL_KEY": "a:b"}).keys == ("a:b",)
    assert Settings.load({"FAL_KEY": "a:b", "FLUX_SERVER_KEYS": "c"}).keys == ("c", "a:b")
    assert Settings.load({"FAL_KEY": "a:b"}, {"keys": "d"}).keys == ("d", "a:b")
    assert Settings.load({"FAL_KEY": ""}).keys == ()
    # A developer's own key is none of a server for tests.
    assert Settings.load({"FAL_KEY": "a:b", "FLUX_SERVER_TESTING": "true"}).keys == ()


def test_a_problem_never_contains_a_key() -> None:
    lines = problems({"FAL_KEY": "secret:key", "FLUX_SERVER_KEYS": "other:key", "FLUX_SERVER_PORT": "x"})
    assert "secret" not in str(lines) and "other" not in str(lines)


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("example.com", False),
    ],
)
def test_loopback_means_this_machine_only(host: str, is_loopback: bool) -> None:
    assert Settings.load({"FLUX_SERVER_HOST": host}).is_loopback is is_loopback


def test_a_network_host_or_a_proxy_makes_the_server_reachable_remotely() -> None:
    assert not Settings.load({}).is_reachable_remotely
    assert Settings.load({"FLUX_SERVER_HOST": "0.0.0.0"}).is_reachable_remotely
    assert Settings.load({"FLUX_SERVER_TRUSTED_PROXIES": "127.0.0.1"}).is_reachable_remotely


def test_a_public_url_loses_its_trailing_slash() -> None:
    settings = Settings.load({"FLUX_SERVER_PUBLIC_URL": "https://fal.example/base/"})
    assert settings.public_url == "https://fal.example/base"


def test_the_data_directory_follows_the_environment_that_is_read(tmp_path: Path) -> None:
    assert Settings.load({"XDG_DATA_HOME": str(tmp_path)}).data_dir == tmp_path / "flux-server"
    assert Settings.load({"FLUX_SERVER_DATA_DIR": str(tmp_path)}).data_dir == tmp_path
    assert Settings.load({}).data_dir == Path.home() / ".local" / "share" / "flux-server"
    with pytest.raises(ValueError, match="data_dir"):
        Settings()  # type: ignore[call-arg]


def test_settings_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.load({}).port = 1  # type: ignore[misc]
