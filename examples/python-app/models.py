"""The orders of the sticker shop. The module's name is also one of flux-server's, which must not matter."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Order:
    """A sticker that a customer ordered. `message` is for the customer."""

    request_id: str
    status: Literal["waiting", "done", "failed"] = "waiting"
    image_url: str = ""
    message: str = ""


class Refused(Exception):
    """A prompt that the customer must change; the message says why."""


class TryLater(Exception):
    """A sticker that cannot be drawn now."""
