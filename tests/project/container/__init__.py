"""The build and the trial of the container image, and a check that runs inside it."""
