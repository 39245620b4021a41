"""Sockets: listeners, limits on time and memory, TLS, the CONNECT proxy, outbound requests."""
