"""One file for each source file."""
