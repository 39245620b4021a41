"""The command line: serve, env."""

import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from server import tls
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

Command = Callable[[Settings], None]


def takes_settings(command: Command) -> Callable[..., None]:
    """Give a command one option for each setting, and WEIGHTS as its arguments."""

    def wrapped(**options: Any) -> None:
        options["weights"] = tuple(options["weights"] or ()) or None
        try:
            settings = Settings.read(os.environ, options)
        except BadSettings as error:
            typer.echo(f"The settings are wrong:\n{error}", err=True)
            raise typer.Exit(BAD_SETTINGS) from None
        command(settings)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__signature__ = inspect.Signature([_parameter(name) for name in Settings.model_fields])  # type: ignore[attr-defined]
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
    # Before any library reads them: none of them reports anything to anybody.
    os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1", DISABLE_TELEMETRY="1")
    # Their warnings repeat prompts and ask for torchvision, which nothing here needs.
    os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Late: `env` and `--help` need none of it.
    from server.serving import serve_until_stopped

    try:
        failure = serve_until_stopped(settings)
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"The server could not start:\n{error}", err=True)
        raise typer.Exit(FAILED) from None
    # Without waiting for a thread that may still be loading weights.
    sys.stdout.flush()
    os._exit(FAILED if failure else 0)


@cli.command()
@takes_settings
def env(settings: Settings) -> None:
    """Print what points each SDK at this server."""
    from server.clients import directions

    typer.echo(directions(settings, tls.paths(settings.data_dir)))


if __name__ == "__main__":
    cli()
