"""Calls of LiteLLM and of LangChain's DALL-E wrapper. Run as a program: it prints the output of a call as JSON.

python -m tests.support.chat_client_calls CALL BASE_URL IMAGE MASK
"""

import json
import sys
from pathlib import Path
from typing import Any

KEY = "id:secret"


def litellm(base_url: str, image: str, mask: str) -> dict[str, Any]:
    """Generate with a newer and an older model, edit with a mask, and cause an error."""
    import litellm

    where = {"api_base": base_url, "api_key": KEY}

    def generate(model: str) -> Any:
        return litellm.image_generation(prompt="a fish", model=f"openai/{model}", size="128x96", **where).data[0]

    newer, older = generate("gpt-image-1"), generate("dall-e-3")
    with Path(image).open("rb") as image_file, Path(mask).open("rb") as mask_file:
        edited = litellm.image_edit(
            image=image_file, mask=mask_file, prompt="a fish", model="openai/gpt-image-1", **where
        ).data[0]
    error = {}
    try:
        generate("unknown")
    except litellm.NotFoundError as raised:
        error = {"message": str(raised), "status": raised.status_code}
    return {"newer": newer.b64_json, "older": older.url, "edited": edited.b64_json, "error": error}


def langchain(base_url: str, image: str, mask: str) -> dict[str, Any]:
    """Generate with the wrapper, which returns a URL."""
    from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper

    wrapper = DallEAPIWrapper(model="dall-e-3", size="128x96", base_url=base_url, api_key=KEY)
    return {"url": wrapper.run("a fish")}


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print(json.dumps({"litellm": litellm, "langchain": langchain}[name](*arguments)))
