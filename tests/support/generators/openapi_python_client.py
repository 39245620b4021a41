"""Generates images with the clients that openapi-python-client made, given the server's URL and a key."""

import json
import sys
import time

import queue_client.models
import whole_client.models
from queue_client.api.default import get_result, get_status, submit
from whole_client.api.fal_aifluxdev import run_fal_ai_flux_dev, submit_fal_ai_flux_dev
from whole_client.api.queue import queue_result, queue_status

url, key = sys.argv[1:]
scheme, _, token = key.partition(" ")
whole = whole_client.AuthenticatedClient(url, token, scheme, timeout=300)
queue = queue_client.AuthenticatedClient(f"{url}/queue", token, scheme, timeout=300)
whole_input = whole_client.models.FluxDevInput(
    "a red apple", image_size=whole_client.models.ImageSize(64, 64), num_inference_steps=1
)
queue_input = queue_client.models.FluxDevInput(
    "a red apple", image_size=queue_client.models.ImageSize(64, 64), num_inference_steps=1
)


def run() -> str:
    """Run a request, and return the URL of its image."""
    output = run_fal_ai_flux_dev.sync(client=whole, body=whole_input)
    return str(output.images[0].url)


def queue_of_whole() -> tuple[list[str], str]:
    """Submit a request with the client of the whole server; return the log's lines and the URL of the image."""
    request_id = submit_fal_ai_flux_dev.sync(client=whole, body=whole_input).request_id
    place = ("fal-ai/flux/dev", request_id)
    while (status := queue_status.sync(*place, client=whole, logs=True)).status != "COMPLETED":
        time.sleep(0.05)
    return [line.message for line in status.logs], queue_result.sync(*place, client=whole).images[0].url


def queue_of_endpoint() -> tuple[list[str], str]:
    """Submit a request with the client of the endpoint's queue; return the log's lines and the URL of the image."""
    submitted = submit.sync(client=queue, body=queue_input)
    assert submitted.logs is None
    while (status := get_status.sync(submitted.request_id, client=queue, logs=1.0)).status != "COMPLETED":
        time.sleep(0.05)
    return [line.message for line in status.logs], get_result.sync(submitted.request_id, client=queue).images[0].url


def problem() -> str:
    """Ask for an unknown request, and return what the error says."""
    return str(get_result.sync("unknown", client=queue).message)


print(json.dumps({"run": run(), "whole": queue_of_whole(), "queue": queue_of_endpoint(), "problem": problem()}))
