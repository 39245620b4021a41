"""ASGI middleware.

A request meets it in this order: metrics, request_id, host_check, Starlette's CORS, errors, rewrite, body_limit.
"""
