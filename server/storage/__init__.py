"""SQLite and files."""
