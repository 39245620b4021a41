"""Ways to go wrong, on purpose."""
