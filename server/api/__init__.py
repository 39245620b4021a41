"""The HTTP API: routes, middleware, and the parsing of requests and building of responses."""
