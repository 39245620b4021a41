"""Tests with hostile input, and of data that must not leave the server."""
