"""A benchmark of the engine against diffusers, with random weights in the shapes of FLUX.1 [dev]."""
