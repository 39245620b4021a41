"""The operator's commands for keys, requests, webhooks and backups.

All but `requests cancel` work without a running server too.
"""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.options import FAILED
from server.errors import DiskFull
from server.settings import Settings, SettingsError

_PLAIN: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "rich_markup_mode": None}

keys = typer.Typer(help="Manage the keys that are stored in the data directory.", **_PLAIN)
requests = typer.Typer(help="List and cancel unfinished requests.", **_PLAIN)
webhooks = typer.Typer(help="List and redeliver webhooks.", **_PLAIN)

DataDir = Annotated[
    str | None,
    typer.Option(
        "--data-dir",
        help="The server's data directory, with its queue, keys and images. [env: FLUX_SERVER_DATA_DIR]",
        show_default=False,
    ),
]


def _ask(data_dir: str | None, command: str, **arguments: Any) -> Any:
    from server.cli import control_socket
    from server.storage.database import CorruptDatabase

    try:
        return control_socket.call(_data_dir(data_dir), command, **arguments)
    except (ValueError, OSError, DiskFull, CorruptDatabase) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED) from None


def _data_dir(data_dir: str | None) -> Path:
    try:
        return Settings.load(os.environ, {"data_dir": data_dir}).data_dir
    except SettingsError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED) from None


@keys.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="Name for the key, such as shop.")],
    scope: Annotated[
        str, typer.Option(help="Rights of the key: client, or operator, which may also see /status.json and /metrics.")
    ] = "client",
    data_dir: DataDir = None,
) -> None:
    """Create a key and print it; it cannot be shown again.

    A running server accepts the key immediately. A server that required no key until now needs a restart.
    """
    from server.storage.database import FILE

    is_new = not (_data_dir(data_dir) / FILE).is_file()
    # Ask before the key exists: without a running server, the answer depends on the keys.
    is_open = is_new or _ask(data_dir, "is_open")
    typer.echo(_ask(data_dir, "add_key", name=name, scope=scope))
    if is_new:
        typer.echo(f"Created a new data directory at {_data_dir(data_dir)}; no server is using it", err=True)
    if is_open:
        typer.echo("A server that requires no key yet will require one from its next start.", err=True)


@keys.command("list")
def list_keys(data_dir: DataDir = None) -> None:
    """List name, scope, owner and creation time of each stored key; logs and /status show the owner."""
    from server.auth import FIRST_KEY

    rows = _ask(data_dir, "list_keys")
    typer.echo("name\tscope\towner\tcreated" if rows else "There are no stored keys.", err=True)
    for key in rows:
        typer.echo(f"{key['name'] or FIRST_KEY}\t{key['scope']}\t{key['owner']}\t{_when(key['created_at'])}")
    typer.echo("(without those in --keys, --operator-keys and FAL_KEY)", err=True)


@keys.command("revoke")
def revoke_key(
    name: Annotated[str, typer.Argument(help="Name of the key, or its owner as shown by `keys list`.")],
    data_dir: DataDir = None,
) -> None:
    """Revoke a key and its tokens immediately. The key's requests continue."""
    _ask(data_dir, "revoke_key", name=name)
    typer.echo(f"Revoked the key {name}")
    if not any(key["name"] for key in _ask(data_dir, "list_keys")):
        message = "No named key is left. After its next start, a server on loopback requires no key,"
        typer.echo(f"{message} unless it has --keys, --operator-keys, FAL_KEY or --trusted-proxies.", err=True)


@requests.command("list")
def list_requests(
    owner: Annotated[str, typer.Option(help="Only requests of this owner, as shown by `keys list`.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Maximum number of requests, oldest first.")] = 100,
    data_dir: DataDir = None,
) -> None:
    """List id, owner, state, endpoint and time of submit of the requests that wait or run."""
    rows = _ask(data_dir, "list_requests", owner=owner, limit=limit)
    typer.echo("request\towner\tstate\tendpoint\tsubmitted" if rows else "No request waits or runs.", err=True)
    for row in rows:
        when = _when(row["submitted_at"])
        typer.echo("\t".join((row["request_id"], row["owner"], row["state"], row["endpoint"], when)))


@requests.command("cancel")
def cancel_requests(
    request_ids: Annotated[list[str], typer.Argument(metavar="REQUEST_ID...", help="Ids of requests.")],
    data_dir: DataDir = None,
) -> None:
    """Cancel requests of any key: waiting ones at once, running ones before their next step."""
    for request_id in request_ids:
        is_cancelled = _ask(data_dir, "cancel_request", request_id=request_id)
        typer.echo(f"{request_id}: {'cancelled' if is_cancelled else 'has ended already'}")


@webhooks.command("list")
def list_webhooks(
    delivered: Annotated[bool, typer.Option("--all", help="Include delivered webhooks.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Maximum number of webhooks, newest first.")] = 100,
    data_dir: DataDir = None,
) -> None:
    """List webhooks that are waiting, or were given up after all retries."""
    rows = _ask(data_dir, "list_webhooks", with_delivered=delivered, limit=limit)
    typer.echo("request\tstate\tattempts\turl\terror" if rows else "There are no webhooks.", err=True)
    for row in rows:
        attempts = f"{row['attempt']} tried"
        typer.echo("\t".join((row["request_id"], _state(row), attempts, row["url"], row["error"] or "")))


@webhooks.command("redeliver")
def redeliver(request_id: str, data_dir: DataDir = None) -> None:
    """Send the webhook of the request with this id again, with all its retries."""
    _ask(data_dir, "redeliver", request_id=request_id)
    typer.echo(f"The webhook of request {request_id} is due now")


def back_up(
    directory: Annotated[Path, typer.Argument(help="A directory that does not exist yet.")], data_dir: DataDir = None
) -> None:
    """Copy queue, images, keys and certificates to DIRECTORY, whether the server runs or not.

    A running server writes the copy itself, so its user must be able to write there. To restore, copy DIRECTORY and
    start the server with the copy as --data-dir, because a server changes its data directory.
    """
    num_bytes = _ask(data_dir, "back_up", directory=str(directory.absolute()))
    if not directory.is_dir():
        message = "The server wrote the backup, but into a directory that only the server sees, such as its own /tmp;"
        typer.echo(f"{message} name a directory below the data directory's parent instead of {directory}", err=True)
        raise typer.Exit(FAILED)
    typer.echo(f"{directory}: {num_bytes / 1e6:.1f} MB")


def _state(webhook: dict[str, Any]) -> str:
    if webhook["delivered_at"]:
        return "delivered"
    return f"due {_when(webhook['due_at'])}" if webhook["due_at"] else "given up"


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
