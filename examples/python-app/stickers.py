"""The sticker shop: draws with fal's client and with OpenAI's, and handles everything that can go wrong."""

import time

import fal_client
from fal_client.client import FalClientHTTPError
from openai import OpenAI, RateLimitError

from models import Order, Refused, TryLater

ENDPOINT = "fal-ai/flux/schnell"
SIZE = {"width": 128, "height": 128}
#: Made at import, as in many applications.
openai_client = OpenAI(max_retries=0)
orders: dict[str, Order] = {}
#: Stickers that the customers have paid for and received.
num_sold = 0


def draw(prompt: str) -> str:
    """Draw a sticker and return its URL. Raises Refused and TryLater."""
    try:
        result = _subscribe(prompt)
    except FalClientHTTPError as error:
        if error.status_code == 422:
            fields = ", ".join(str(entry["loc"][-1]) for entry in error.response.json()["detail"])
            raise Refused(f"Please change: {fields}") from None
        if error.status_code == 504:
            raise TryLater("Too many people draw stickers now") from None
        if error.status_code == 499:
            raise TryLater("This sticker was stopped") from None
        raise
    if any(result["has_nsfw_concepts"]):
        raise Refused("This sticker would not suit everyone")
    return result["images"][0]["url"]


def _subscribe(prompt: str) -> dict:
    """Draw; try once more after an error of the server."""
    try:
        return fal_client.subscribe(ENDPOINT, arguments={"prompt": prompt, "image_size": SIZE})
    except FalClientHTTPError as error:
        if error.status_code != 500:
            raise
    return fal_client.subscribe(ENDPOINT, arguments={"prompt": prompt, "image_size": SIZE})


def draw_soon(prompt: str, seconds: float) -> str:
    """Draw a sticker, but cancel it after so many seconds. Raises TryLater."""
    handle = fal_client.submit(ENDPOINT, arguments={"prompt": prompt, "image_size": SIZE})
    deadline = time.monotonic() + seconds
    while not isinstance(handle.status(), fal_client.Completed):
        if time.monotonic() > deadline:
            handle.cancel()
            raise TryLater("This takes too long")
        time.sleep(0.05)
    return handle.get()["images"][0]["url"]


def draw_logo(name: str) -> str:
    """Draw a logo with OpenAI's client and return its URL; at the rate limit, wait as long as the server says."""
    for _ in range(3):
        try:
            logo = openai_client.images.generate(prompt=f"a logo: {name}", size="256x256", response_format="url")
            return logo.data[0].url
        except RateLimitError as error:
            time.sleep(float(error.response.headers.get("retry-after", 1)))
    raise TryLater("Too many logos")


def order(prompt: str, webhook_url: str) -> Order:
    """Order a sticker, which fal sends to our webhook."""
    handle = fal_client.submit(ENDPOINT, arguments={"prompt": prompt, "image_size": SIZE}, webhook_url=webhook_url)
    return orders.setdefault(handle.request_id, Order(handle.request_id))


def place(order: Order) -> str:
    """Return what the page of a waiting order says."""
    status = fal_client.status(ENDPOINT, order.request_id)
    return f"You are number {status.position + 1}" if isinstance(status, fal_client.Queued) else "Your turn"


def look_up(request_id: str) -> Order:
    """Return an order; ask fal for the result if the webhook has not come yet."""
    found = orders[request_id]
    if found.status == "waiting" and isinstance(fal_client.status(ENDPOINT, request_id), fal_client.Completed):
        deliver(request_id, fal_client.result(ENDPOINT, request_id))
    return found


def deliver(request_id: str, output: dict) -> None:
    """Complete an order, from the webhook or from `look_up`; do nothing if it is complete already."""
    global num_sold
    # The webhook may come before `order` has stored the order.
    found = orders.setdefault(request_id, Order(request_id))
    if found.status != "waiting":
        return
    found.status, found.image_url = "done", output["images"][0]["url"]
    num_sold += 1
