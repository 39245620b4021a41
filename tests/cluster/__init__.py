"""Tests with several Ray nodes; `make cluster` runs them."""
