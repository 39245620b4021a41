"""Unit tests: most files test one source file and have its name."""
