"""The FLUX engine. It imports torch, so endpoints import it inside `setup()`."""
