"""The server: fal's API in front of a durable queue and a worker."""
