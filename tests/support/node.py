"""The Node SDKs: the call that points each SDK at a server, and functions that run scripts with an SDK."""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.support.forking import run_flux_server
from tests.support.server_process import Server

JS = Path(__file__).parent / "js"
#: The request id in the samples of the endpoint's page.
PAGE_ID = "764cabcf-b745-4b3e-ae38-1200304cf45b"
#: A comment at the end of each line that `program` adds to a sample.
MARK = " // not of the page"
_IMPORTS = {
    "@fal-ai/serverless-client": 'import * as fal from "@fal-ai/serverless-client";',
    "@fal-ai/client": 'import { fal } from "@fal-ai/client";',
}


@dataclass(frozen=True)
class Client:
    """One SDK with one way to point it at a server."""

    sdk: str
    #: The fal.config call that `flux-server env` prints.
    config_call: str

    @property
    def is_raw(self) -> bool:
        """Whether a result is the output itself instead of {data, requestId}."""
        return self.sdk == "@fal-ai/serverless-client"

    def at(self, url: str, other: str) -> "Client":
        """Return the same client, pointed at `other` instead of `url`."""
        return replace(self, config_call=self.config_call.replace(url, other))

    def output(self, result: Any) -> Any:
        """Return the endpoint's output from a result of this SDK."""
        assert self.is_raw or result.keys() == {"data", "requestId"}
        return result if self.is_raw else result["data"]

    def run(self, script: str, *arguments: str) -> Any:
        """Run one of the scripts; return the JSON that it prints."""
        return _printed_json(["node", script, *arguments], {"SDK": self.sdk, "POINTING": self.config_call})

    def run_page(self, name: str, shown: str, request_id: str = PAGE_ID) -> Any:
        """Run a sample of the page; return the value of the expression `shown` at its end."""
        return _printed_json(["node", "--input-type=module"], {}, self.program(name, shown, request_id))

    def program(self, name: str, shown: str, request_id: str) -> str:
        """Build a program from a sample: point it at the server, replace the request id, print `shown` at the end."""
        sample = page(name).replace(_IMPORTS["@fal-ai/serverless-client"], _IMPORTS[self.sdk])
        lines = sample.replace(PAGE_ID, request_id).splitlines()
        if "fal.config({" in lines:
            # A second fal.config would undo the first.
            options = self.config_call.removeprefix("fal.config({").removesuffix("});").strip()
            lines.insert(lines.index("fal.config({") + 1, f"  {options},{MARK}")
        else:
            lines.insert(1, f"{self.config_call}{MARK}")
        return "\n".join([*lines, f"console.log(JSON.stringify({shown}));{MARK}", ""])


def page(name: str) -> str:
    """Read a sample of fal's page for fal-ai/flux/dev, verbatim."""
    return (JS / "page" / f"{name}.mjs").read_text()


def clients(server: Server) -> dict[str, Client]:
    """Return the SDKs, pointed at the server as `flux-server env` describes."""
    environment = {**server.environment(), "FLUX_SERVER_PORT": server.url.rpartition(":")[2]}
    process = run_flux_server("env", environment=environment)
    process.check_returncode()
    comments = " ".join(
        line.removeprefix("#").strip() for line in process.stdout.splitlines() if line.startswith("#   ")
    )
    proxy_url, middleware = re.findall(r"fal\.config\(.*?}\);", comments)
    assert "proxyUrl" in proxy_url
    assert "requestMiddleware" in middleware
    return {
        "serverless-client": Client("@fal-ai/serverless-client", middleware),
        "client, proxyUrl": Client("@fal-ai/client", proxy_url),
        "client, requestMiddleware": Client("@fal-ai/client", middleware),
    }


def _printed_json(command: list[str], environment: Mapping[str, str], program: str = "") -> Any:
    """Run Node; return the JSON in the last line that it prints."""
    # The page's samples require FAL_KEY. Only PATH is passed on, because other variables could set a proxy.
    variables = {"PATH": os.environ["PATH"], "FAL_KEY": "local", **environment}
    process = subprocess.run(command, cwd=JS, env=variables, input=program, capture_output=True, text=True, timeout=90)
    assert process.returncode == 0, f"{' '.join(command)} failed:\n{process.stdout}{process.stderr}"
    return json.loads(process.stdout.splitlines()[-1])
