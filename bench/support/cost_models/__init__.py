"""Models that measuring needs."""
