"""A benchmark of the engine against diffusers, with random weights of the true shapes."""
