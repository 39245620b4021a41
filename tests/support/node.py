"""The Node SDKs: how each is pointed at the server, and how a script is run with one."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.support.server_process import ROOT, Server

JS = Path(__file__).parent / "js"
#: The id that stands in the samples of the endpoint's page.
PAGE_ID = "764cabcf-b745-4b3e-ae38-1200304cf45b"
#: Ends each line of a program that is not of the page.
MARK = " // not of the page"
_IMPORTS = {
    "@fal-ai/serverless-client": 'import * as fal from "@fal-ai/serverless-client";',
    "@fal-ai/client": 'import { fal } from "@fal-ai/client";',
}


@dataclass(frozen=True)
class Client:
    """One SDK, pointed at a server in one way."""

    sdk: str
    #: The call of fal.config that the server's own directions name.
    pointing: str

    @property
    def is_raw(self) -> bool:
        """Whether results are the output itself, rather than {data, requestId}."""
        return self.sdk == "@fal-ai/serverless-client"

    def at(self, url: str, other: str) -> "Client":
        """The same, pointed at another server."""
        return replace(self, pointing=self.pointing.replace(url, other))

    def output(self, result: Any) -> Any:
        """The output in a result of this SDK."""
        assert self.is_raw or result.keys() == {"data", "requestId"}
        return result if self.is_raw else result["data"]

    def run(self, script: str, *arguments: str) -> Any:
        """Run one of the scripts; returns what it says."""
        return _said(["node", script, *arguments], {"SDK": self.sdk, "POINTING": self.pointing})

    def run_page(self, name: str, shown: str, request_id: str = PAGE_ID) -> Any:
        """Run a sample of the page, then say the value of `shown`."""
        return _said(["node", "--input-type=module"], {}, self.program(name, shown, request_id))

    def program(self, name: str, shown: str, request_id: str) -> str:
        """The page's sample with the line that points it here, another request id, and what it came to said."""
        sample = page(name).replace(_IMPORTS["@fal-ai/serverless-client"], _IMPORTS[self.sdk])
        lines = sample.replace(PAGE_ID, request_id).splitlines()
        if "fal.config({" in lines:
            # A second fal.config would undo the first.
            options = self.pointing.removeprefix("fal.config({").removesuffix("});").strip()
            lines.insert(lines.index("fal.config({") + 1, f"  {options},{MARK}")
        else:
            lines.insert(1, f"{self.pointing}{MARK}")
        return "\n".join([*lines, f"console.log(JSON.stringify({shown}));{MARK}", ""])


def page(name: str) -> str:
    """A sample of fal's page for fal-ai/flux/dev, word for word."""
    return (JS / "page" / f"{name}.mjs").read_text()


def clients(server: Server) -> dict[str, Client]:
    """The SDKs as `flux-server env` says to point them."""
    environment = {**server.environment(), "FLUX_SERVER_PORT": server.url.rpartition(":")[2]}
    command = [sys.executable, "-m", "server", "env"]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60)
    comments = " ".join(line.removeprefix("#").strip() for line in said.stdout.splitlines() if line.startswith("#   "))
    proxy_url, middleware = re.findall(r"fal\.config\(.*?}\);", comments)
    assert "proxyUrl" in proxy_url
    assert "requestMiddleware" in middleware
    return {
        "serverless-client": Client("@fal-ai/serverless-client", middleware),
        "client, proxyUrl": Client("@fal-ai/client", proxy_url),
        "client, requestMiddleware": Client("@fal-ai/client", middleware),
    }


def _said(command: list[str], environment: Mapping[str, str], program: str = "") -> Any:
    """The JSON in the last line of what Node prints."""
    # FAL_KEY because the page says so; no more of the machine's than PATH, or a proxy might be taken.
    clean = {"PATH": os.environ["PATH"], "FAL_KEY": "local", **environment}
    done = subprocess.run(command, cwd=JS, env=clean, input=program, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])
