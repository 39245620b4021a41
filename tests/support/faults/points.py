"""Named points of a request, a start, an upload and a backup, at which tests kill the server with SIGKILL."""

import importlib
import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """A point before or after the n-th call of a function.

    `is_acknowledged` says whether the client has the response to its request or upload when the server dies.
    """

    module: str
    name: str
    is_before: bool
    number: int = 1
    is_acknowledged: bool = True


def _before(module: str, name: str, number: int = 1, *, is_acknowledged: bool = True) -> Point:
    return Point(module, name, True, number, is_acknowledged)


def _after(module: str, name: str, number: int = 1, *, is_acknowledged: bool = True) -> Point:
    return Point(module, name, False, number, is_acknowledged)


#: Points of a request, from submission to webhook.
POINTS = {
    "before the row is written": _before("server.queue.job_table", "insert", is_acknowledged=False),
    "before the row is committed": _after("server.queue.job_table", "insert", is_acknowledged=False),
    "before the submit is answered": _after("server.queue.queue", "Queue.submit", is_acknowledged=False),
    "before the claim": _before("server.queue.job_table", "claim"),
    "before the claim is committed": _after("server.queue.job_table", "claim"),
    "after the claim": _after("server.queue.queue", "Queue.claim"),
    "before the first step": _before("tests.support.fake_models", "NullEngine.advance"),
    "between steps": _after("tests.support.fake_models", "NullEngine.advance", 3),
    "before the image is decoded": _before("tests.support.fake_models", "NullEngine.decode"),
    "after the safety check": _after("tests.support.fake_models", "NullEngine.is_unsafe"),
    "before the file is written": _before("server.storage.file_store", "FileStore.create"),
    "before the file has its name": _before("server.storage.file_store", "FileStore.move_in"),
    "after the first of two files": _after("server.storage.file_store", "FileStore.create", 1),
    "before the end is written": _before("server.queue.job_table", "complete"),
    "before the end is committed": _after("server.queue.job_table", "complete"),
    "after the end": _after("server.queue.queue", "Queue.finish"),
    "before the webhook is sent": _before("server.webhooks.delivery", "WebhookSender._send"),
    "before the webhook's end is written": _before("server.webhooks.delivery", "WebhookSender._record"),
}
#: Points of a server start after the previous process crashed.
AT_START = {
    "before the crash count is committed": _after("server.queue.job_table", "count_crash"),
    "after the crash count": _before("server.queue.queue", "Queue.recover"),
}
#: Points of a multipart upload whose parts are being sent.
IN_UPLOAD = {
    "before a part is kept": _before("server.storage.uploads", "Uploads._take", 2, is_acknowledged=False),
    "after a part is kept": _after("server.storage.uploads", "Uploads._take", 2, is_acknowledged=False),
    "before the parts are joined": _before("server.storage.uploads", "join", is_acknowledged=False),
    "after the parts are joined": _after("server.storage.uploads", "join", is_acknowledged=False),
    "before the upload is listed": _before("server.storage.uploads", "insert_file_row", is_acknowledged=False),
    "before that is committed": _after("server.storage.uploads", "insert_file_row", is_acknowledged=False),
    "before the parts are removed": _before("server.storage.uploads", "Uploads._end", is_acknowledged=False),
}
#: Points of a backup of the data directory.
IN_BACKUP = {
    "before the database is copied": _before("server.storage.database", "Database.backup_to"),
    "after the database is copied": _after("server.storage.database", "Database.backup_to"),
    "before the certificates are copied": _before("server.storage.backup", "_copy", 4),
}


def arm(name: str, marker: Path) -> None:
    """Make this process die when it reaches the point, unless the file `marker` exists. The death creates this file."""
    point = {**POINTS, **AT_START, **IN_UPLOAD, **IN_BACKUP}[name]
    holder: Any = importlib.import_module(point.module)
    *path, last = point.name.split(".")
    for part in path:
        holder = getattr(holder, part)
    original: Callable[..., Any] = getattr(holder, last)
    calls = itertools.count(1)

    def die() -> None:
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(*arguments: Any, **options: Any) -> Any:
        # Number this call now, because other calls may start before this one returns.
        number = next(calls)
        if point.is_before and number == point.number:
            die()
        result = original(*arguments, **options)
        if not point.is_before and number == point.number:
            die()
        return result

    setattr(holder, last, dying)
