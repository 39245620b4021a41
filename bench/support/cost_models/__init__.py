"""Models for benchmarks."""
