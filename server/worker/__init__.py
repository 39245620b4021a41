"""The execution loop of one GPU."""
