"""Benchmarks. Each script makes one run on one machine, and prints ratios if it compares two programs."""
