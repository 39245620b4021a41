"""The command line: serve, pull, doctor, bench, env, run; the operator's commands stand in `admin.py`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from server.cli import admin
from server.cli.options import with_settings_options
from server.errors import DiskFull
from server.library_env import disable_telemetry_and_warnings, limit_openmp_spinning
from server.net import tls
from server.settings import Settings

cli = typer.Typer(
    name="flux-server",
    help="fal's API for FLUX.1 [dev] on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Help as plain text: rich would take "[env: ...]" for markup.
    rich_markup_mode=None,
)

#: The exit code of a server that could not start or stopped by itself.
FAILED = 1
#: The shell's own code for a command that is not there.
NOT_FOUND = 127


@cli.command()
@with_settings_options
def serve(settings: Settings) -> None:
    """Serve WEIGHTS: demo, a hub id, a folder in diffusers layout, or ENDPOINT=FOLDER."""
    disable_telemetry_and_warnings()
    limit_openmp_spinning()
    # Late: `env` and `--help` need none of it.
    from server import logs
    from server.cli.serve import serve_until_stopped

    logs.set_up(settings.log_level, settings.log_format)
    try:
        failure = serve_until_stopped(settings)
    except (ValueError, OSError, RuntimeError, DiskFull) as error:
        typer.echo(f"The server could not start:\n{error}", err=True)
        raise typer.Exit(FAILED) from None
    # Without waiting for a thread that may still be loading weights.
    sys.stdout.flush()
    os._exit(FAILED if failure else 0)


@cli.command()
@with_settings_options
def pull(
    settings: Settings, hub_id: Annotated[str, typer.Argument(help="Such as black-forest-labs/FLUX.1-dev.")]
) -> None:
    """Bring weights from the hub into its cache, and the safety checker with them; HF_TOKEN is used if set."""
    disable_telemetry_and_warnings()
    from models.loading import hub

    try:
        for wanted in dict.fromkeys((hub_id, settings.safety_checker)):
            # A checker may be a folder, which is here already.
            if Path(wanted).is_dir():
                continue
            folder = hub.pull(wanted)
            typer.echo(f"{wanted}: {hub.size(folder) / 1e9:.2f} GB of weights in {folder}")
    except OSError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED) from None


@cli.command()
@with_settings_options
def doctor(settings: Settings) -> None:
    """Say what this machine can run, and why not."""
    disable_telemetry_and_warnings()
    from server.cli.doctor import run_checks

    findings = list(run_checks(settings))
    for finding in findings:
        typer.echo(f"{'✓' if finding.ok else '✗'} {finding.name}: {finding.message}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(FAILED)


@cli.command()
@with_settings_options
def bench(
    settings: Settings,
    random_weights: Annotated[
        str, typer.Option(help="tiny or full: weights of these shapes that nobody trained, full being FLUX.1 [dev]'s.")
    ] = "",
    sizes: Annotated[str, typer.Option(help="Width x height in pixels, separated by commas.")] = "1024x768",
    steps: Annotated[int, typer.Option(min=1, max=50, help="Steps of each picture.")] = 28,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the medians are shown.")] = 3,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that wait together.")] = 1,
    cap_gb: Annotated[float, typer.Option(min=0, help="Use no more of the GPU's memory than this; 0 is all.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the figures as JSON.")] = None,
) -> None:
    """Measure the engine's tiers beside diffusers' own pipeline, on this machine."""
    disable_telemetry_and_warnings()
    limit_openmp_spinning()
    from server.cli import bench as measuring

    try:
        for line, found in measuring.run(
            settings,
            shape=_one_of(("", "tiny", "full"), random_weights, "--random-weights"),
            sizes=[_size(word) for word in sizes.split(",")],
            num_steps=steps,
            num_rounds=rounds,
            num_waiting=waiting,
            cap_gb=cap_gb,
        ):
            typer.echo(line)
            if json_file:
                measuring.write(json_file, found)
    except (OSError, ValueError, RuntimeError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED) from None


def _one_of(known: tuple[str, ...], word: str, option: str) -> str:
    if word not in known:
        raise typer.BadParameter(f"{option}: {word} is not one of {', '.join(filter(None, known))}")
    return word


def _size(word: str) -> tuple[int, int]:
    width, _, height = word.strip().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise typer.BadParameter(f"--sizes: {word} is not WIDTHxHEIGHT")
    return int(width), int(height)


cli.add_typer(admin.keys, name="keys")
cli.add_typer(admin.webhooks, name="webhooks")
cli.command("backup")(admin.back_up)


@cli.command()
@with_settings_options
def env(settings: Settings) -> None:
    """Print what points each SDK at this server."""
    from server.cli import control_socket
    from server.cli.client_env import shell_exports

    lacks_key = not settings.keys and control_socket.requires_key(settings.data_dir)
    typer.echo(shell_exports(settings, tls.certificate_files(settings.data_dir), lacks_key=lacks_key))


@cli.command()
@with_settings_options
def run(
    settings: Settings, command: Annotated[list[str], typer.Argument(help="The program and its arguments.")]
) -> None:
    """Run a Python or Node program with its fal calls brought to this server."""
    from server.cli import client_env

    try:
        client_env.check(settings, tls.certificate_files(settings.data_dir), command)
        typer.echo(f"flux-server: {client_env.run_limitations(command)}", err=True)
        client_env.run(settings, tls.certificate_files(settings.data_dir), command)
    except client_env.UnsupportedProgram as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED) from None
    except OSError as error:
        typer.echo(f"{command[0]}: {error.strerror}", err=True)
        raise typer.Exit(NOT_FOUND) from None
