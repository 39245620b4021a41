"""ASGI middleware.

A request passes through these middlewares in this order: metrics, request_id, host_check, Starlette's CORS, errors,
rewrite, body_limit.
"""
