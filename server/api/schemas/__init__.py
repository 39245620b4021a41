"""Types of response bodies, which the type checker and the OpenAPI document share."""
