"""Logging configuration: one line per event, as text or JSON, and a progress bar while weights load."""

import logging
import re
import sys
from typing import Any, Literal

import structlog
from structlog.stdlib import ProcessorFormatter
from tqdm import tqdm

from models.base import LoadProgress

#: uvicorn's error for a response without a last chunk. The server ends failed streams like this on purpose.
_CUT_OFF = "ASGI callable returned without completing response."
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def set_up(level: str, style: Literal["text", "json"]) -> None:
    """Send all logs of this process to standard error, with the fields of `extra`, such as request_id."""
    handler = _Handler(draws_bars=style == "text" and sys.stderr.isatty())
    handler.setFormatter(_formatter(style, has_colours=sys.stderr.isatty()))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").addFilter(_is_unexpected)
    # At lower levels these libraries log URLs and prompts.
    for name in ("httpx", "httpx2", "httpcore", "httpcore2", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _is_unexpected(record: logging.LogRecord) -> bool:
    return record.msg != _CUT_OFF


def _formatter(style: str, *, has_colours: bool) -> ProcessorFormatter:
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        _without_progress,
    ]
    # Neither style logs the variables of a failed function, because they may hold prompts and keys.
    if style == "json":
        shared += [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
        ]
        renderer: structlog.typing.Processor = structlog.processors.JSONRenderer(ensure_ascii=False)
    else:
        shared += [_on_one_line, structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False)]
        renderer = structlog.dev.ConsoleRenderer(
            colors=has_colours,
            pad_event_to=0,
            pad_level=False,
            sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        )
    processors = [ProcessorFormatter.remove_processors_meta, renderer]
    return ProcessorFormatter(processors=processors, foreign_pre_chain=shared)


def _without_progress(logger: Any, name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Drop the progress bar's data, which the message repeats, and Ray's timestamp."""
    event.pop("loading", None)
    # Ray adds its timestamp to every record of a process.
    event.pop("_ray_timestamp_ns", None)
    return event


def _on_one_line(logger: Any, name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escape control characters, so that clients' input can neither add log lines nor move the cursor."""
    event["event"] = _CONTROL.sub(lambda match: ascii(match[0])[1:-1], str(event["event"]))
    return event


class _Handler(logging.Handler):
    """A log handler that keeps the loading progress bar below the log lines of a terminal."""

    def __init__(self, *, draws_bars: bool) -> None:
        super().__init__()
        self._draws_bars = draws_bars
        self._bar: tqdm[Any] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, or update the progress bar."""
        loading: LoadProgress | None = getattr(record, "loading", None)
        if loading and self._draws_bars:
            self._draw(loading)
            return
        if self._bar:
            self._bar.close()
            self._bar = None
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)

    def _draw(self, loading: LoadProgress) -> None:
        if self._bar is None or self._bar.total != loading.total_bytes:
            self._bar = tqdm(total=loading.total_bytes, unit="B", unit_scale=True, leave=False, file=sys.stderr)
        self._bar.set_description(f"loading {loading.component}", refresh=False)
        self._bar.update(loading.loaded_bytes - self._bar.n)
        self._bar.refresh()
