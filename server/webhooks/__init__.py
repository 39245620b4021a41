"""Webhooks: results that the server posts to clients."""
