"""The layout, the documents, the container."""
