"""The server: fal's API, a durable queue of requests, and the workers that generate images."""
