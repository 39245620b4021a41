"""Models for the server under attack."""
