"""Many GPUs, on Ray."""
