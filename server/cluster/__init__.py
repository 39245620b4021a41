"""Serving on many GPUs through Ray."""
