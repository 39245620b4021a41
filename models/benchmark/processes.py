"""Child processes for measurements: each starts with all of its memory free, and may die without ending the others."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from models.base import DeviceLost, GenerationFailed


class ChildFailed(Exception):
    """A child process that failed; the message is the reason."""


@dataclass(frozen=True)
class _Failure:
    reason: str


def run_in_child(function: Callable[[Any], Iterator[Any]], argument: Any) -> Iterator[Any]:
    """Call a generator function in a new process, and yield what it yields.

    The function, its argument and its results must be picklable. Raises ChildFailed if the function raises an error or
    the process dies.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_results, args=(sender, function, argument))
    process.start()
    # Only the child keeps this end, so that `recv` ends when the child ends.
    sender.close()
    try:
        while True:
            result = receiver.recv()
            if isinstance(result, _Failure):
                raise ChildFailed(result.reason)
            yield result
    except EOFError:
        process.join()
        if process.exitcode:
            raise ChildFailed(_end(process.exitcode)) from None
    finally:
        process.kill()
        process.join()
        receiver.close()


def _send_results(sender: Connection, function: Callable[[Any], Iterator[Any]], argument: Any) -> None:
    # Ctrl+C also reaches this process, and the parent kills it then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for result in function(argument):
            sender.send(result)
    except (OSError, ValueError, RuntimeError, GenerationFailed, DeviceLost) as error:
        sender.send(_Failure(str(error)))


def _end(code: int) -> str:
    if code != -signal.SIGKILL:
        return f"the process ended by signal {-code}" if code < 0 else f"the process ended with exit code {code}"
    return "the process was killed; perhaps the machine's memory ran out"
