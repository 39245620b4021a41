"""Tests with PyTorch for CUDA that need no GPU, for `make cuda-proof`."""
