"""Benchmarks: each script is one run on one machine, and prints ratios where there is a peer to compare with."""
