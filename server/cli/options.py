"""Settings as options of a command."""

import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from server.settings import PREFIX, Settings, SettingsError

#: The exit code for bad settings.
BAD_SETTINGS = 2


def with_settings_options(func: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each setting, and WEIGHTS as its arguments unless it has some of its own."""
    own = [parameter for name, parameter in inspect.signature(func).parameters.items() if name != "settings"]

    def wrapped(**given: Any) -> None:
        arguments = {parameter.name: given.pop(parameter.name) for parameter in own}
        given["weights"] = tuple(given.get("weights") or ()) or None
        try:
            settings = Settings.load(os.environ, given)
        except SettingsError as error:
            typer.echo(f"The settings are wrong:\n{error}", err=True)
            raise typer.Exit(BAD_SETTINGS) from None
        func(settings, **arguments)

    # What a command asks for without a default is its argument; WEIGHTS stay away from it.
    has_arguments = any(parameter.default is inspect.Parameter.empty for parameter in own)
    settings = [_parameter(name) for name in Settings.model_fields if name != "weights" or not has_arguments]
    wrapped.__name__, wrapped.__doc__ = func.__name__, func.__doc__
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
