"""Comparisons with diffusers, bit for bit."""
