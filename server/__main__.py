"""The command line: serve, pull, doctor, bench, env, run; the operator's commands stand in `commands.py`."""

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from server import commands, tls
from server.errors import DiskFull
from server.quiet import keep_quiet, spin_less
from server.settings import PREFIX, BadSettings, Settings

cli = typer.Typer(
    name="flux-server",
    help="fal's API for FLUX.1 [dev] on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Help as plain text: rich would take "[env: ...]" for markup.
    rich_markup_mode=None,
)

#: Exit codes: a bad setting, and a server that could not start or stopped by itself.
BAD_SETTINGS, FAILED = 2, 1
#: The shell's own code for a command that is not there.
NOT_FOUND = 127


def takes_settings(act: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each setting, and WEIGHTS as its arguments unless it has some of its own."""
    own = [parameter for name, parameter in inspect.signature(act).parameters.items() if name != "settings"]

    def wrapped(**given: Any) -> None:
        arguments = {parameter.name: given.pop(parameter.name) for parameter in own}
        given["weights"] = tuple(given.get("weights") or ()) or None
        try:
            settings = Settings.read(os.environ, given)
        except BadSettings as error:
            typer.echo(f"The settings are wrong:\n{error}", err=True)
            raise typer.Exit(BAD_SETTINGS) from None
        act(settings, **arguments)

    # What a command asks for without a default is its argument; WEIGHTS stay away from it.
    has_arguments = any(parameter.default is inspect.Parameter.empty for parameter in own)
    settings = [_parameter(name) for name in Settings.model_fields if name != "weights" or not has_arguments]
    wrapped.__name__, wrapped.__doc__ = act.__name__, act.__doc__
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    wrapped.__signature__ = inspect.Signature([*settings, *keyword])  # type: ignore[attr-defined]
    return wrapped


def _parameter(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    shown = f"{field.description} [env: {PREFIX}{name.upper()}]"
    kind = inspect.Parameter.KEYWORD_ONLY
    if name == "weights":
        argument = Annotated[list[str] | None, typer.Argument(help=shown, show_default="demo")]
        return inspect.Parameter(name, kind, default=None, annotation=argument)
    flag = name.replace("_", "-")
    if field.annotation is bool:
        switch = Annotated[bool | None, typer.Option(f"--{flag}/--no-{flag}", help=shown, show_default=False)]
        return inspect.Parameter(name, kind, default=None, annotation=switch)
    # Read as text, so that Settings finds every problem and not only the first.
    option = Annotated[str | None, typer.Option(f"--{flag}", help=shown, show_default=False)]
    return inspect.Parameter(name, kind, default=None, annotation=option)


@cli.command()
@takes_settings
def serve(settings: Settings) -> None:
    """Serve WEIGHTS: demo, a hub id, a folder in diffusers layout, or ENDPOINT=FOLDER."""
    keep_quiet()
    spin_less()
    # Late: `env` and `--help` need none of it.
    from server import logs
    from server.serving import serve_until_stopped

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
@takes_settings
def pull(
    settings: Settings, hub_id: Annotated[str, typer.Argument(help="Such as black-forest-labs/FLUX.1-dev.")]
) -> None:
    """Bring weights from the hub into its cache, and the safety checker with them; HF_TOKEN is used if set."""
    keep_quiet()
    from models import hub

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
@takes_settings
def doctor(settings: Settings) -> None:
    """Say what this machine can run, and why not."""
    keep_quiet()
    from server.doctor import examine

    findings = list(examine(settings))
    for finding in findings:
        typer.echo(f"{'✓' if finding.is_well else '✗'} {finding.what}: {finding.words}")
    if not all(finding.is_well for finding in findings):
        raise typer.Exit(FAILED)


@cli.command()
@takes_settings
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
    keep_quiet()
    spin_less()
    from server import bench as measuring

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


cli.add_typer(commands.keys, name="keys")
cli.add_typer(commands.webhooks, name="webhooks")
cli.command("backup")(commands.back_up)


@cli.command()
@takes_settings
def env(settings: Settings) -> None:
    """Print what points each SDK at this server."""
    from server import control_socket
    from server.clients import directions

    lacks_key = not settings.keys and control_socket.wants_key(settings.data_dir)
    typer.echo(directions(settings, tls.paths(settings.data_dir), lacks_key=lacks_key))


@cli.command()
@takes_settings
def run(
    settings: Settings, command: Annotated[list[str], typer.Argument(help="The program and its arguments.")]
) -> None:
    """Run a Python or Node program with its fal calls brought to this server."""
    from server import clients

    try:
        clients.check(settings, tls.paths(settings.data_dir), command)
        typer.echo(f"flux-server: {clients.what_run_leaves_out(command)}", err=True)
        clients.run(settings, tls.paths(settings.data_dir), command)
    except clients.CannotBring as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED) from None
    except OSError as error:
        typer.echo(f"{command[0]}: {error.strerror}", err=True)
        raise typer.Exit(NOT_FOUND) from None


if __name__ == "__main__":
    cli()
