"""Code and data that the tests share."""
