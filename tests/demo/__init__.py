"""The demo weights and their recipe."""
