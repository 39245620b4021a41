"""The routes, one file for each surface of the API."""
