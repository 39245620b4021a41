"""A recorder of every host that a Python program looks up or connects to.

Python imports this module automatically if its directory is on PYTHONPATH. The module also removes the waits between
a client's retries.
"""

import os
import sys
import time
from typing import Any

#: Audit events, each with the index of the argument that holds the host or the address.
_EVENTS = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
}
_log = os.open(os.environ["CANARY"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _EVENTS:
        address = arguments[_EVENTS[event]]
        # If the address of a connection is a string, it is the path of a Unix socket, which reaches no other machine.
        if not isinstance(address, str) or event != "socket.connect":
            host = address[0] if isinstance(address, tuple) else address
            os.write(_log, f"{host}\n".encode())


sys.addaudithook(_record)
time.sleep = lambda seconds: None
