"""Settings as options of Typer commands."""

import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from server.settings import PREFIX, Settings, SettingsError

#: The exit code for invalid settings.
BAD_SETTINGS = 2
#: The exit code of a command that failed, and of a server that could not start or stopped because of an error.
FAILED = 1


def with_settings_options(func: Callable[..., None]) -> Callable[..., None]:
    """Return the command with an option for each setting, and with WEIGHTS as arguments unless it has others.

    The command gets the loaded Settings. If the settings are invalid, the process exits with BAD_SETTINGS instead.
    """
    own = [parameter for name, parameter in inspect.signature(func).parameters.items() if name != "settings"]

    def wrapped(**options: Any) -> None:
        arguments = {parameter.name: options.pop(parameter.name) for parameter in own}
        options["weights"] = tuple(options.get("weights") or ()) or None
        try:
            settings = Settings.load(os.environ, options)
        except SettingsError as error:
            typer.echo(f"The settings are invalid:\n{error}", err=True)
            raise typer.Exit(BAD_SETTINGS) from None
        func(settings, **arguments)

    # A parameter without a default is an argument. Such a command cannot take WEIGHTS too.
    has_arguments = any(parameter.default is inspect.Parameter.empty for parameter in own)
    settings = [_parameter(name) for name in Settings.model_fields if name != "weights" or not has_arguments]
    wrapped.__name__, wrapped.__doc__ = func.__name__, func.__doc__
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    wrapped.__signature__ = inspect.Signature([*settings, *keyword])  # type: ignore[attr-defined]
    return wrapped


def shown_default(name: str) -> str:
    """Return the default of a setting as an operator would write it; "" if there is none."""
    if name == "data_dir":
        return "$XDG_DATA_HOME/flux-server, else ~/.local/share/flux-server"
    value = Settings.model_fields[name].default
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def _parameter(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    text = f"{field.description} [env: {PREFIX}{name.upper()}; default: {shown_default(name) or 'none'}]"
    kind = inspect.Parameter.KEYWORD_ONLY
    if name == "weights":
        argument = Annotated[list[str] | None, typer.Argument(help=text, show_default=False)]
        return inspect.Parameter(name, kind, default=None, annotation=argument)
    flag = name.replace("_", "-")
    if field.annotation is bool:
        switch = Annotated[bool | None, typer.Option(f"--{flag}/--no-{flag}", help=text, show_default=False)]
        return inspect.Parameter(name, kind, default=None, annotation=switch)
    # Options are strings, so that Settings reports all problems instead of only the first.
    choices = "|".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else None
    option = Annotated[str | None, typer.Option(f"--{flag}", help=text, metavar=choices, show_default=False)]
    return inspect.Parameter(name, kind, default=None, annotation=option)
