"""A pytest plugin that gives an application's tests a real flux-server, in a separate process.

It imports nothing of the server, so an application may have modules with the names of the server's.
"""

from flux_server_testing.controls import FalServer, Hold, RecordedRequest, ServerError

__all__ = ["FalServer", "Hold", "RecordedRequest", "ServerError"]
