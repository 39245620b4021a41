"""The recipe of the demo weights: pictures are rendered, networks trained, and a diffusers folder is written."""
