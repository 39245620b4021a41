"""Tests of clients that generators make from the OpenAPI documents, for `make generators`."""
