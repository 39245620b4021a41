"""Settings: read once, all problems told at once."""

from pathlib import Path
from typing import Any

import pytest

from server.settings import Settings, SettingsError


def problems(environment: dict[str, str], options: dict[str, Any] | None = None) -> list[str]:
    """What is said of these, a line each."""
    with pytest.raises(SettingsError) as refused:
        Settings.load(environment, options)
    return str(refused.value).splitlines()


def test_nothing_given_is_the_demo_for_this_machine_alone() -> None:
    settings = Settings.load({})
    assert (settings.weights, settings.host, settings.port, settings.tls_port) == (("demo",), "127.0.0.1", 8000, 8443)
    assert settings.is_loopback
    assert settings.keys == ()


def test_options_beat_the_environment() -> None:
    environment = {"FLUX_SERVER_PORT": "1", "FLUX_SERVER_HOST": "0.0.0.0"}
    settings = Settings.load(environment, {"port": "2", "host": None})
    assert (settings.port, settings.host) == (2, "0.0.0.0")


def test_what_is_not_ours_is_left_alone() -> None:
    assert Settings.load({"PATH": "/bin", "SERVER_PORT": "9", "flux_server_port": "9"}) == Settings.load({})


def test_every_problem_is_listed_at_once() -> None:
    bad = {
        "PORT": "many",
        "TLS_PORT": "70000",
        "MAX_RUNNING": "0",
        "DEVICE": "abacus",
        "TRUSTED_PROXIES": "1.2.3.4/99",
    }
    found = problems({f"FLUX_SERVER_{name}": value for name, value in bad.items()})
    assert len(found) == len(bad)
    for name, value in bad.items():
        (line,) = [line for line in found if f"FLUX_SERVER_{name})" in line]
        assert line.startswith(f"--{name.lower().replace('_', '-')} ")
        assert value in line


def test_a_setting_that_does_not_exist_is_refused_by_name() -> None:
    (line,) = problems({"FLUX_SERVER_PROT": "1"})
    assert "FLUX_SERVER_PROT" in line and "unknown setting" in line


def test_a_problem_in_an_option_names_the_option() -> None:
    (line,) = problems({}, {"retention_days": "-1"})
    assert line.startswith("--retention-days (FLUX_SERVER_RETENTION_DAYS)")


BAD = {
    "port": ["-1", "65536", "http"],
    "max_queue_length": ["0"],
    "max_side": ["63", "14143"],
    "max_pixels": ["0"],
    "max_body_mib": ["0"],
    "max_upload_mib": ["0"],
    "max_uploads_gb": ["0", "nan"],
    "proxy_port": ["-1", "65536"],
    "proxy_others": ["perhaps"],
    "retention_days": ["0", "nan"],
    "retention_gb": ["0"],
    "shutdown_grace": ["-1"],
    "enforce_safety_checker": ["perhaps"],
    "public_url": ["fal.example", "ftp://fal.example"],
    "log_level": ["loud"],
    "trusted_proxies": ["a proxy"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_stops_the_start(name: str, value: str) -> None:
    assert len(problems({f"FLUX_SERVER_{name.upper()}": value})) == 1


def test_an_empty_variable_stands_for_none() -> None:
    settings = Settings.load({"FLUX_SERVER_PORT": "", "FLUX_SERVER_WEIGHTS": "", "FAL_KEY": ""})
    assert (settings.port, settings.weights, settings.keys) == (8000, ("demo",), ())


def test_the_key_that_env_gives_to_clients_of_an_open_server_asks_for_none() -> None:
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
    ],
)
def test_what_would_never_work_is_refused_at_the_start(name: str, value: str) -> None:
    assert len(problems({f"FLUX_SERVER_{name.upper()}": value})) == 1


@pytest.mark.parametrize("entry", ["localhost:18110", "http://localhost", "hooks.lan/path", "[::1]:80", "10.0.0.0/99"])
def test_what_is_allowed_has_neither_scheme_nor_port(entry: str) -> None:
    (line,) = problems({"FLUX_SERVER_OUTBOUND_ALLOW": f"10.0.0.0/8,{entry}"})
    assert f"{entry} should be a host, an address or a network, without scheme or port" in line


def test_ports_differ() -> None:
    (line,) = problems({"FLUX_SERVER_PORT": "8100", "FLUX_SERVER_TLS_PORT": "8100"})
    assert "should differ" in line


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"GPUS": "2"}, "need --ray"),
        ({"MAX_GPUS": "2"}, "need --ray"),
        ({"RAY": "local", "GPUS": "2", "MAX_GPUS": "2"}, "use either --gpus for a fixed number"),
        ({"RAY": "local", "MIN_GPUS": "1"}, "--min-gpus needs --max-gpus"),
        ({"RAY": "local", "MIN_GPUS": "3", "MAX_GPUS": "2"}, "--min-gpus should be at most --max-gpus"),
    ],
)
def test_numbers_of_gpus_that_say_nothing(given: dict[str, str], words: str) -> None:
    (line,) = problems({f"FLUX_SERVER_{name}": value for name, value in given.items()})
    assert words in line


def test_the_door_needs_tls() -> None:
    (line,) = problems({"FLUX_SERVER_PROXY_PORT": "8888", "FLUX_SERVER_TLS_PORT": "0"})
    assert "--proxy-port needs --tls-port" in line
    assert Settings.load({"FLUX_SERVER_PROXY_PORT": "8888"}).proxy_port == 8888


def test_lists_are_separated_by_commas() -> None:
    settings = Settings.load({"FLUX_SERVER_KEYS": " a , b,", "FLUX_SERVER_OUTBOUND_ALLOW": "10.0.0.0/8,hooks.lan"})
    assert settings.keys == ("a", "b")
    assert settings.outbound_allow == ("10.0.0.0/8", "hooks.lan")


@pytest.mark.parametrize("word", ["1", "true", "True", "yes", "on"])
def test_yes_has_many_words(word: str) -> None:
    assert Settings.load({"FLUX_SERVER_ENFORCE_SAFETY_CHECKER": word}).enforce_safety_checker


def test_fal_key_is_one_of_the_keys() -> None:
    assert Settings.load({"FAL_KEY": "a:b"}).keys == ("a:b",)
    assert Settings.load({"FAL_KEY": "a:b", "FLUX_SERVER_KEYS": "c"}).keys == ("c", "a:b")
    assert Settings.load({"FAL_KEY": "a:b"}, {"keys": "d"}).keys == ("d", "a:b")
    assert Settings.load({"FAL_KEY": ""}).keys == ()


def test_a_key_is_never_repeated_in_a_problem() -> None:
    found = problems({"FAL_KEY": "secret:key", "FLUX_SERVER_KEYS": "other:key", "FLUX_SERVER_PORT": "x"})
    assert "secret" not in str(found) and "other" not in str(found)


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
def test_loopback_is_this_machine_alone(host: str, is_loopback: bool) -> None:
    assert Settings.load({"FLUX_SERVER_HOST": host}).is_loopback is is_loopback


def test_others_come_by_the_network_or_through_a_proxy() -> None:
    assert not Settings.load({}).is_reachable_remotely
    assert Settings.load({"FLUX_SERVER_HOST": "0.0.0.0"}).is_reachable_remotely
    assert Settings.load({"FLUX_SERVER_TRUSTED_PROXIES": "127.0.0.1"}).is_reachable_remotely


def test_a_public_url_has_no_slash_at_its_end() -> None:
    settings = Settings.load({"FLUX_SERVER_PUBLIC_URL": "https://fal.example/base/"})
    assert settings.public_url == "https://fal.example/base"


def test_the_data_folder_follows_the_environment_that_was_read(tmp_path: Path) -> None:
    assert Settings.load({"XDG_DATA_HOME": str(tmp_path)}).data_dir == tmp_path / "flux-server"
    assert Settings.load({"FLUX_SERVER_DATA_DIR": str(tmp_path)}).data_dir == tmp_path
    assert Settings.load({}).data_dir == Path.home() / ".local" / "share" / "flux-server"
    with pytest.raises(ValueError, match="data_dir"):
        Settings()  # type: ignore[call-arg]


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.load({}).port = 1  # type: ignore[misc]
