"""The tests of this directory exist only with PyTorch for CUDA, which brings Triton."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
