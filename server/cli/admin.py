"""The operator's commands beside serving: keys, webhooks, backup. They work with the server running, and without."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from server.errors import DiskFull
from server.settings import Settings, SettingsError

FAILED = 1
_PLAIN: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "rich_markup_mode": None}

keys = typer.Typer(help="Keys that this server makes and knows, beside those of --keys.", **_PLAIN)
webhooks = typer.Typer(help="What clients' URLs were told, or not yet.", **_PLAIN)

DataDir = Annotated[
    str | None,
    typer.Option("--data-dir", help="Folder of the queue. [env: FLUX_SERVER_DATA_DIR]", show_default=False),
]


def _ask(data_dir: str | None, act: str, **arguments: Any) -> Any:
    from server.cli import control_socket
    from server.storage.database import CorruptDatabase

    try:
        return control_socket.call(_folder(data_dir), act, **arguments)
    except (ValueError, OSError, DiskFull, CorruptDatabase) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED) from None


def _folder(data_dir: str | None) -> Path:
    try:
        return Settings.load(os.environ, {"data_dir": data_dir}).data_dir
    except SettingsError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED) from None


@keys.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="Whose it is, such as shop.")],
    scope: Annotated[str, typer.Option(help="client, or operator, who may see /status and /metrics too.")] = "client",
    data_dir: DataDir = None,
) -> None:
    """Make a key and print it, this once. The server knows it at once, or, where it asked for none, when restarted."""
    from server.storage.database import FILE

    is_new = not (_folder(data_dir) / FILE).is_file()
    # Asked before: without a server, a key that is there is asked for.
    is_open = is_new or _ask(data_dir, "is_open")
    typer.echo(_ask(data_dir, "add_key", name=name, scope=scope))
    if is_new:
        typer.echo(f"Made a new data folder at {_folder(data_dir)}; no server runs on it", err=True)
    if is_open:
        typer.echo("A server that asks for no key yet begins to at its next start.", err=True)


@keys.command("list")
def list_keys(data_dir: DataDir = None) -> None:
    """Name, scope and age of each; the owner is what logs and /status call it."""
    found = _ask(data_dir, "list_keys")
    typer.echo("name\tscope\towner\tmade" if found else "There are none.", err=True)
    for key in found:
        typer.echo(f"{key['name'] or '(the first)'}\t{key['scope']}\t{key['owner']}\t{_when(key['created_at'])}")


@keys.command("revoke")
def revoke_key(
    name: Annotated[str, typer.Argument(help="Its name, or its owner as `keys list` tells it.")],
    data_dir: DataDir = None,
) -> None:
    """Forget a key and its tokens, at once. What it asked for goes on."""
    _ask(data_dir, "revoke_key", name=name)
    if not any(key["name"] for key in _ask(data_dir, "list_keys")):
        message = "No key with a name is left. On loopback, and without --keys, the server asks for none"
        typer.echo(f"{message} from its next start.", err=True)


@webhooks.command("list")
def list_webhooks(
    delivered: Annotated[bool, typer.Option("--all", help="Those that were delivered too.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, the newest first.")] = 100,
    data_dir: DataDir = None,
) -> None:
    """Webhooks that wait, or were given up after all retries."""
    found = _ask(data_dir, "list_webhooks", with_delivered=delivered, limit=limit)
    typer.echo("request\tstate\tattempts\turl\terror" if found else "There are none.", err=True)
    for each in found:
        tried = f"{each['attempt']} tried"
        typer.echo("\t".join((each["request_id"], _state(each), tried, each["url"], each["error"] or "")))


@webhooks.command("redeliver")
def redeliver(request_id: str, data_dir: DataDir = None) -> None:
    """Send one again, with all its retries."""
    _ask(data_dir, "redeliver", request_id=request_id)


def back_up(
    folder: Annotated[Path, typer.Argument(help="A folder that is not there yet.")], data_dir: DataDir = None
) -> None:
    """Copy queue, pictures, keys and certificates into FOLDER, while the server goes on. To restore, serve it."""
    num_bytes = _ask(data_dir, "back_up", folder=str(folder.absolute()))
    typer.echo(f"{folder}: {num_bytes / 1e6:.1f} MB")


def _state(webhook: dict[str, Any]) -> str:
    if webhook["delivered_at"]:
        return "delivered"
    return f"due {_when(webhook['due_at'])}" if webhook["due_at"] else "given up"


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
