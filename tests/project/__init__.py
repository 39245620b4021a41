"""Tests of the source tree, the documents and the container."""
