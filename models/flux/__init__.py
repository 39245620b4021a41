"""The FLUX engine. Its modules import torch, so endpoints import them inside `setup()`."""
