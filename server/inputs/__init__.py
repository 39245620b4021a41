"""Files that requests refer to. All are untrusted."""
