"""The command line: serve, pull, doctor, bench, env and run; `admin.py` has the operator's commands."""

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli import admin
from server.cli.options import FAILED, with_settings_options
from server.errors import DiskFull
from server.library_env import allow_kernels, disable_telemetry_and_warnings, set_pytorch_variables
from server.net import tls
from server.settings import Settings

if TYPE_CHECKING:
    from server.cli.doctor import Check

cli = typer.Typer(
    name="flux-server",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Help as plain text, because rich would interpret "[env: ...]" as markup.
    rich_markup_mode=None,
)

#: The shell's exit code for a command that is not found.
NOT_FOUND = 127


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"flux-server {version('flux-server')}")
        raise typer.Exit


@cli.callback()
def main(
    is_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """fal's API for FLUX.1 [dev] on your own machine."""


@cli.command()
@with_settings_options
def serve(settings: Settings) -> None:
    """Serve WEIGHTS: demo, a hub id, a directory in diffusers layout, or ENDPOINT=WEIGHTS."""
    disable_telemetry_and_warnings()
    set_pytorch_variables()
    allow_kernels(settings.kernels_allow)
    # Import the server only here, because `env` and `--help` do not need it.
    from models.flux.attempts import forget_open_attempts
    from server import logs
    from server.cli.serve import serve_until_stopped
    from server.cli.testing import data_dir_for_tests

    logs.set_up(settings.log_level, settings.log_format)
    try:
        with data_dir_for_tests(settings) as settings:
            failure = serve_until_stopped(settings)
    except (ValueError, OSError, RuntimeError, DiskFull) as error:
        typer.echo(f"The server could not start:\n{error}", err=True)
        raise typer.Exit(FAILED) from None
    forget_open_attempts()
    # Exit at once, without waiting for a thread that may still be loading weights.
    sys.stdout.flush()
    os._exit(FAILED if failure else 0)


@cli.command()
@with_settings_options
def pull(
    settings: Settings,
    hub_id: Annotated[
        str,
        typer.Argument(
            help="Id on the Hugging Face hub, such as black-forest-labs/FLUX.1-dev, or with --base a file on it, such"
            " as owner/name/file.gguf."
        ),
    ],
) -> None:
    """Download weights and the safety checker from the hub to this machine, with the token in HF_TOKEN if set."""
    disable_telemetry_and_warnings()
    from models.loading import hub, specs

    is_file = specs.is_single_file(hub_id)
    try:
        if is_file:
            _pull_file(hub_id, settings.base)
        for name in dict.fromkeys((*([] if is_file else [hub_id]), settings.safety_checker)):
            # The safety checker may be a local directory.
            if Path(name).is_dir():
                continue
            directory = (hub.pull_lora if specs.is_lora(name) else hub.pull)(name)
            typer.echo(f"{name}: {hub.size(directory) / 1e9:.2f} GB of weights in {directory}")
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED) from None


def _pull_file(place: str, base: str) -> None:
    """Download a single file, and of its base what the file lacks. Raises OSError and ValueError."""
    from models.base import SingleFile
    from models.loading import hub, pipeline, specs

    weights = specs.parse_spec(place, base)
    assert isinstance(weights, SingleFile)
    path = pipeline.local_file(weights)
    typer.echo(f"{place}: {path.stat().st_size / 1e9:.2f} GB of weights in {path.parent}")
    directory = pipeline.weights_directory(weights)
    typer.echo(f"{base}: {hub.size(directory) / 1e9:.2f} GB of weights in {directory}")


@cli.command()
@with_settings_options
def doctor(
    settings: Settings,
    is_check: Annotated[
        bool, typer.Option("--check", help="Also test the device, and WEIGHTS on it. On a GPU this takes minutes.")
    ] = False,
) -> None:
    """Check what this machine can run, and explain what it cannot run."""
    disable_telemetry_and_warnings()
    set_pytorch_variables()
    allow_kernels(settings.kernels_allow)
    from server.cli.doctor import run_checks, run_self_test

    checks = [_echo(check) for check in run_checks(settings)]
    if is_check and all(check.ok for check in checks if check.name != "ports"):
        checks += [_echo(check) for check in run_self_test(settings)]
    elif is_check:
        typer.echo("The self test did not run, because it needs a machine that passes these checks.", err=True)
    if not all(check.ok for check in checks):
        raise typer.Exit(FAILED)


def _echo(check: "Check") -> "Check":
    typer.echo(f"{'✓' if check.ok else '✗'} {check.name}: {check.message}")
    return check


@cli.command()
@with_settings_options
def bench(
    settings: Settings,
    random_weights: Annotated[
        str,
        typer.Option(help="Measure random weights instead of WEIGHTS: full (in the shapes of FLUX.1 [dev]) or tiny."),
    ] = "",
    sizes: Annotated[str, typer.Option(help="Image sizes in pixels, such as 512x512,1024x768.")] = "1024x768",
    steps: Annotated[int, typer.Option(min=1, max=50, help="Steps per image.")] = 28,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to measure; the table shows the medians.")] = 3,
    waiting: Annotated[int, typer.Option(min=1, help="Number of requests that arrive at the same time.")] = 1,
    cap_gb: Annotated[float, typer.Option(min=0, help="Maximum GPU memory to use, in GB; 0 means no limit.")] = 0,
    plans: Annotated[
        str, typer.Option(help="Memory plans, such as resident,group-offload, or all; default: that of --memory.")
    ] = "",
    prompts: Annotated[
        Path | None, typer.Option(help="File with a prompt in each line, whose images PSNR and SSIM compare.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the figures to, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File to draw the figures to, .svg or .png.")] = None,
) -> None:
    """Compare the engine's memory plans and tiers with diffusers' pipeline: speed, memory, start and fidelity."""
    disable_telemetry_and_warnings()
    set_pytorch_variables()
    allow_kernels(settings.kernels_allow)
    from models.benchmark.job import Workload
    from server.cli import bench as measuring
    from server.cli.bench_plot import draw

    shape = _one_of(("", "tiny", "full"), random_weights, "--random-weights")
    workloads = [Workload(*_size(word), steps, waiting) for word in sizes.split(",")]
    report: measuring.Report = {}
    try:
        measuring.require_extra(prompts, plot)
        texts = measuring.read_prompts(prompts)
        names = _plans(plans) or (settings.memory,)
        options = measuring.Options(shape, names, workloads, rounds, cap_gb, texts)
        for line, report in measuring.run(settings, options):
            typer.echo(line)
            if json_file:
                measuring.write(json_file, report)
        if plot:
            draw(plot, report)
    except (OSError, ValueError, RuntimeError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED) from None


def _plans(words: str) -> tuple[str, ...]:
    from models.loading.memory_plans import NAMES

    if words == "all":
        return tuple(name for name in NAMES if name != "auto")
    names = tuple(word.strip() for word in words.split(",") if word.strip())
    return tuple(_one_of(NAMES, name, "--plans") for name in names)


def _one_of(known: tuple[str, ...], word: str, option: str) -> str:
    if word not in known:
        raise typer.BadParameter(f"{option}: {word} is not one of {', '.join(filter(None, known))}")
    return word


def _size(word: str) -> tuple[int, int]:
    width, _, height = word.strip().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise typer.BadParameter(f"--sizes: {word} is not WIDTHxHEIGHT, such as 1024x768")
    return int(width), int(height)


cli.add_typer(admin.keys, name="keys")
cli.add_typer(admin.requests, name="requests")
cli.add_typer(admin.webhooks, name="webhooks")
cli.command("backup")(admin.back_up)


@cli.command()
@with_settings_options
def env(settings: Settings) -> None:
    """Print the configuration that points each SDK at this server."""
    from server.cli import control_socket
    from server.cli.client_env import shell_exports

    needs_key = not settings.keys and control_socket.requires_key(settings.data_dir)
    files = tls.certificate_files(settings.data_dir)
    # `eval` hides the comments of the output, so the note goes to stderr too.
    if settings.tls_port and not files.bundle.exists():
        message = "a server creates one when it first starts; if the server already runs, give its --data-dir"
        typer.echo(f"flux-server: there is no certificate in {files.bundle.parent}: {message}", err=True)
    if needs_key:
        typer.echo(
            "flux-server: the server requires a key; set FAL_KEY to a key, then run this command again", err=True
        )
    typer.echo(shell_exports(settings, files, needs_key=needs_key))


@cli.command()
@with_settings_options
def run(
    settings: Settings, command: Annotated[list[str], typer.Argument(help="The program and its arguments.")]
) -> None:
    """Run a Python or Node program with its fal calls redirected to this server.

    With --testing, start a server for the program's tests, run the program, and stop the server.
    """
    from flux_server_testing.controls import ServerError
    from flux_server_testing.process import NotStarted
    from server.cli import client_env
    from server.cli.testing import run_with_server

    try:
        if settings.testing:
            typer.echo(f"flux-server: {client_env.run_limitations(command)}", err=True)
            raise typer.Exit(run_with_server(settings, command))
        client_env.check(settings, tls.certificate_files(settings.data_dir), command)
        typer.echo(f"flux-server: {client_env.run_limitations(command)}", err=True)
        client_env.run(settings, tls.certificate_files(settings.data_dir), command)
    except (client_env.UnsupportedProgram, NotStarted, ServerError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED) from None
    except OSError as error:
        typer.echo(f"{command[0]}: {error.strerror}", err=True)
        raise typer.Exit(NOT_FOUND) from None
