"""Bit for bit as diffusers."""
