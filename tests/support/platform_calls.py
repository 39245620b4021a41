"""A program that calls each command of genvoy or falgen, which use fal's platform API, and prints the results as JSON.

`python -m tests.support.platform_calls genvoy|falgen ENDPOINT DIRECTORY`
"""

import asyncio
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

PROMPT = "a red apple"


def genvoy(endpoint: str, directory: str) -> dict[str, Any]:
    """Call genvoy's tools and read its resources, through the MCP server that genvoy contains; return the results."""
    client_of, server = import_module("fastmcp").Client, import_module("genvoy.server").mcp

    async def run() -> dict[str, Any]:
        async with client_of(server) as client:

            async def call(name: str, **arguments: Any) -> Any:
                return (await client.call_tool(name, arguments)).data

            async def read(uri: str) -> Any:
                return json.loads((await client.read_resource(uri))[0].text)

            generated = await call("generate", model_id=endpoint, prompt=PROMPT, output_path=f"{directory}/one")
            batch = {"model_id": endpoint, "prompt": PROMPT, "count": 2, "output_dir": f"{directory}/batch"}
            comparison = {"model_ids": [endpoint, "test/copy"], "prompt": PROMPT, "output_dir": f"{directory}/compared"}
            request = {"model_id": endpoint, "request_id": generated["request_id"]}
            return {
                "search_models": await call("search_models", query="null"),
                "get_schema": await call("get_schema", model_id=endpoint),
                "estimate_cost": await call("estimate_cost", model_id=endpoint, count=3),
                "generate": generated,
                "generate_batch": await call("generate_batch", **batch),
                "generate_compare": await call("generate_compare", **comparison),
                "get_job_status": await call("get_job_status", **request),
                "cancel_job": await _failure(call("cancel_job", **request)),
                "models": await read("genvoy://models"),
                "recent": await read("genvoy://recent"),
            }

    return asyncio.run(run())


async def _failure(call: Any) -> str:
    try:
        return f"no failure: {await call}"
    except Exception as error:
        return str(error)


def falgen(endpoint: str, directory: str) -> dict[str, Any]:
    """Call falgen's tools for fal, its upload, and its chat endpoint, which this server lacks; return the results."""
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
