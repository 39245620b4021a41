"""Generates images with the Python clients that openapi-generator made, given the server's URL and a key."""

import json
import sys
import time

import queue_client
import whole_client

url, key = sys.argv[1:]


def run() -> str:
    """Run a request, and return the URL of its image."""
    size = whole_client.ImageSizeOrPreset(whole_client.ImageSize(width=64, height=64))
    fields = whole_client.FluxDevInput(prompt="a red apple", image_size=size, num_inference_steps=1)
    configuration = whole_client.Configuration(host=url, api_key={"apiKeyAuth": key})
    with whole_client.ApiClient(configuration) as client:
        output = whole_client.FalAiFluxDevApi(client).run_fal_ai_flux_dev(fields)
        return str(output.images[0].url)


def queue_of_whole() -> tuple[list[str], str]:
    """Submit a request with the client of the whole server; return the log's lines and the URL of the image."""
    fields = whole_client.FluxDevInput(
        prompt="a red apple", image_size=whole_client.ImageSizeOrPreset("square"), num_inference_steps=1
    )
    configuration = whole_client.Configuration(host=url, api_key={"apiKeyAuth": key})
    with whole_client.ApiClient(configuration) as client:
        request_id = whole_client.FalAiFluxDevApi(client).submit_fal_ai_flux_dev(fields).request_id
        queue = whole_client.QueueApi(client)
        while (status := queue.queue_status("fal-ai/flux/dev", request_id, logs=True)).status != "COMPLETED":
            time.sleep(0.05)
        output = queue.queue_result("fal-ai/flux/dev", request_id)
        return [line.message for line in status.logs], output.images[0].url


def queue_of_endpoint() -> tuple[list[str], str]:
    """Submit a request with the client of the endpoint's queue; return the log's lines and the URL of the image."""
    size = queue_client.ImageSizeOrPreset(queue_client.ImageSize(width=64, height=64))
    fields = queue_client.FluxDevInput(prompt="a red apple", image_size=size, num_inference_steps=1)
    configuration = queue_client.Configuration(host=f"{url}/queue", api_key={"apiKeyAuth": key})
    with queue_client.ApiClient(configuration) as client:
        queue = queue_client.DefaultApi(client)
        submitted = queue.submit(fields)
        assert submitted.logs is None
        while (status := queue.get_status(submitted.request_id, logs=1)).status != "COMPLETED":
            time.sleep(0.05)
        return [line.message for line in status.logs], queue.get_result(submitted.request_id).images[0].url


def problem() -> str:
    """Ask for an unknown request, and return what the error says."""
    configuration = queue_client.Configuration(host=f"{url}/queue", api_key={"apiKeyAuth": key})
    with queue_client.ApiClient(configuration) as client:
        try:
            queue_client.DefaultApi(client).get_result("unknown")
        except queue_client.ApiException as error:
            return str(error.data.message)
    return ""


print(json.dumps({"run": run(), "whole": queue_of_whole(), "queue": queue_of_endpoint(), "problem": problem()}))
