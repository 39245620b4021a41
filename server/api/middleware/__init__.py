"""ASGI middleware.

A request passes through it in this order: metrics, request_id, host_check, Starlette's CORS, errors, rewrite,
body_limit.
"""
