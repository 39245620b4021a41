"""Everything that is not a test."""
