"""The engine beside diffusers, and weights of the true shapes to measure it with."""
