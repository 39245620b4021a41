"""The recipe of the demo weights: it renders images, trains networks and writes a directory in diffusers layout."""
