"""The flux-server command."""
