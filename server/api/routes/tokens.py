"""Short-lived tokens for browsers, and the public keys for webhook signatures."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from server.api import validation
from server.api.dependencies import authenticate, get_services
from server.api.operations import PUBLIC, json_body
from server.api.responses import FalJSONResponse
from server.api.schemas.tokens import WebhookKeys
from server.net.bytes_in_flight import SMALL

router = APIRouter(tags=["tokens"])


class TokenRequest(BaseModel):
    """A request for a token that is valid for some apps. fal's SDKs send aliases: "flux" for fal-ai/flux/dev."""

    allowed_apps: list[Annotated[str, Field(max_length=255)]] = Field(
        min_length=1, max_length=100, description="The apps that the token is for.", examples=[["flux"]]
    )
    token_expiration: int = Field(120, ge=1, le=3600, description="Seconds until the token expires.")


@router.post(
    "/tokens",
    summary="Issue a token for browsers",
    response_model=str,
    response_description="The token.",
    openapi_extra=json_body(TokenRequest),
)
async def issue(request: Request) -> Response:
    """Issue a token, and return it as a bare JSON string, the only form that all SDKs read."""
    owner = authenticate(request)
    async with get_services(request).in_flight.body(request, owner, SMALL) as body:
        token_request = validation.parse_body(TokenRequest, body)
    scope = " ".join(token_request.allowed_apps)
    return FalJSONResponse(get_services(request).keys.issue(owner, scope, token_request.token_expiration))


@router.get(
    "/.well-known/jwks.json",
    summary="Get the keys that verify webhooks",
    response_model=WebhookKeys,
    openapi_extra=PUBLIC,
)
async def jwks(request: Request) -> Response:
    """Return the public keys of webhook signatures, which receivers may cache for a day."""
    keys = await asyncio.to_thread(get_services(request).signer.jwks)
    return FalJSONResponse(keys, headers={"cache-control": "public, max-age=86400"})
