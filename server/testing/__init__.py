"""Faults on request, and a record of the requests: for a server that was started for an application's tests."""
