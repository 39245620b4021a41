"""One GPU: the execution loop."""
