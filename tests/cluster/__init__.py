"""Several Ray nodes: for make cluster."""
