"""Notes every name that a Python program looks up and every address that it turns to: put first on PYTHONPATH.

Python imports it by itself. It also takes the waiting out of a client that tries again and again.
"""

import os
import sys
import time
from typing import Any

_EVENTS = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
}
_notes = os.open(os.environ["CANARY"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _EVENTS:
        told = arguments[_EVENTS[event]]
        # A Unix socket leads nowhere.
        if not isinstance(told, str) or event != "socket.connect":
            host = told[0] if isinstance(told, tuple) else told
            os.write(_notes, f"{host}\n".encode())


sys.addaudithook(_note)
time.sleep = lambda seconds: None
