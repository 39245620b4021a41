"""Models and hooks that fail on purpose."""
