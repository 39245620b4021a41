"""Sockets: listeners, time limits, TLS, the CONNECT proxy, outbound requests."""
