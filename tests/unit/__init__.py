"""Unit tests: one file for each source file."""
