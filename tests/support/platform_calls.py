"""Released programs that call fal's platform API, each of their commands once: prints what came of it as JSON.

`python -m tests.support.platform_calls genvoy|falgen ENDPOINT FOLDER`
"""

import asyncio
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

PROMPT = "a red apple"


def genvoy(endpoint: str, folder: str) -> dict[str, Any]:
    """Its tools and resources, through its own MCP server."""
    client_of, server = import_module("fastmcp").Client, import_module("genvoy.server").mcp

    async def run() -> dict[str, Any]:
        async with client_of(server) as client:

            async def call(name: str, **arguments: Any) -> Any:
                return (await client.call_tool(name, arguments)).data

            async def read(uri: str) -> Any:
                return json.loads((await client.read_resource(uri))[0].text)

            made = await call("generate", model_id=endpoint, prompt=PROMPT, output_path=f"{folder}/one")
            batch = {"model_id": endpoint, "prompt": PROMPT, "count": 2, "output_dir": f"{folder}/batch"}
            compared = {"model_ids": [endpoint, "test/copy"], "prompt": PROMPT, "output_dir": f"{folder}/compared"}
            named = {"model_id": endpoint, "request_id": made["request_id"]}
            return {
                "search_models": await call("search_models", query="null"),
                "get_schema": await call("get_schema", model_id=endpoint),
                "estimate_cost": await call("estimate_cost", model_id=endpoint, count=3),
                "generate": made,
                "generate_batch": await call("generate_batch", **batch),
                "generate_compare": await call("generate_compare", **compared),
                "get_job_status": await call("get_job_status", **named),
                "cancel_job": await _failure(call("cancel_job", **named)),
                "models": await read("genvoy://models"),
                "recent": await read("genvoy://recent"),
            }

    return asyncio.run(run())


async def _failure(doing: Any) -> str:
    try:
        return f"no failure: {await doing}"
    except Exception as error:
        return str(error)


def falgen(endpoint: str, folder: str) -> dict[str, Any]:
    """Its tools that call fal, and its upload. What it asks a language model is not offered here."""
    tools = import_module("falgen.tools").discover_tools()
    auth, config = import_module("falgen.auth"), import_module("falgen.config")
    httpx = import_module("httpx")

    def call(name: str, **arguments: Any) -> Any:
        return json.loads(tools.execute(name, arguments))

    url = f"{config.OPENROUTER_BASE}/chat/completions"
    return {
        "generate": call("generate", endpoint_id=endpoint, input={"prompt": PROMPT}),
        "search_models": call("search_models", query="null"),
        "model_info": call("model_info", endpoint_id=endpoint),
        "get_pricing": call("get_pricing", endpoint_ids=[endpoint]),
        "check_usage": call("check_usage", summary=True),
        "check_usage by day": call("check_usage", summary=False, endpoint_id=endpoint),
        "request_history": call("request_history", endpoint_id=endpoint, limit=5),
        "list_workflows": call("list_workflows"),
        "upload": auth.upload_file(b"content", "text/plain", "note.txt"),
        "chat": httpx.post(url, json={}, headers=auth.get_auth_headers()).json(),
    }


PROGRAMS: dict[str, Callable[[str, str], dict[str, Any]]] = {"genvoy": genvoy, "falgen": falgen}

if __name__ == "__main__":
    Path(sys.argv[3]).mkdir(exist_ok=True)
    print(json.dumps(PROGRAMS[sys.argv[1]](*sys.argv[2:])))
