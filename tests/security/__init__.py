"""Hostile input, and what must not leave."""
