"""Types of the public keys that verify webhooks."""

from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict


class WebhookKey(TypedDict):
    """A public Ed25519 key as a JSON Web Key."""

    kty: Annotated[str, Field(examples=["OKP"])]
    crv: Annotated[str, Field(examples=["Ed25519"])]
    x: Annotated[str, Field(description="The key, in base64 for URLs.")]
    kid: Annotated[str, Field(description="The id of the key.")]
    use: Annotated[str, Field(examples=["sig"])]
    alg: Annotated[str, Field(examples=["EdDSA"])]


class WebhookKeys(TypedDict):
    """A JSON Web Key Set."""

    keys: Annotated[list[WebhookKey], Field(description="The keys, the newest first.")]
