"""Programs for a separate network: `python -m tests.support.network_programs PROGRAM ARGUMENT...` prints JSON."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from PIL import Image

from models.loading.specs import DEMO
from models.schema import EXAMPLE_IMAGE
from tests.support.fake_hub import COMMIT
from tests.support.network import PUBLIC, Resolver, TrafficRecorder, catch_all_server, route_everything_here
from tests.support.server_process import ROOT, TEST_MODELS, Server, serving, serving_with_proxy
from tests.unit.inputs.test_loras import GOOD
from tests.unit.net.test_outbound import FORBIDDEN, INNER

#: For each name, the lists of addresses that successive lookups return.
NAMES = {
    "public.test": [[PUBLIC]],
    "private.test": [["10.0.0.1"]],
    "loopback.test": [["127.0.0.1"]],
    "zero.test": [["0.0.0.0"]],
    "metadata.test": [["169.254.169.254"]],
    "unique-local.test": [["fd00::1"]],
    "site-local.test": [["fec0::1"]],
    "six.test": [["::1"]],
    "mapped.test": [["::ffff:10.0.0.1"]],
    "nat64.test": [["64:ff9b::a00:1"]],
    "nat64-local.test": [["64:ff9b:1::a00:1"]],
    "six-to-four.test": [["2002:a00:1::"]],
    "teredo.test": [["2001:0:a00:1::"]],
    "translated.test": [["::ffff:0:a00:1"]],
    "compatible.test": [["::a00:1"]],
    "reserved.test": [["200::1"]],
    "carrier.test": [["100.64.0.1"]],
    # The first lookup returns a public address, later lookups a private one.
    "rebinding.test": [[PUBLIC], ["10.0.0.1"]],
}
#: URLs that lead to a forbidden address, which shows only once their name is looked up.
BY_NAME = [f"http://{name}/" for name in NAMES if name not in ("public.test", "rebinding.test")]
BY_NAME += ["http://localhost/", "http://0x7f.1/", "http://0x7f000001/"]
REBINDING = "http://rebinding.test/image.png"
CORPUS = [*filter(None, FORBIDDEN), *BY_NAME]


def _files() -> dict[str, bytes]:
    """Return the files of the web server at every address."""
    image = io.BytesIO()
    Image.new("RGB", (64, 64)).save(image, "PNG")
    return {"/image.png": image.getvalue(), "/lora.safetensors": GOOD}


def _send_image(client: httpx.Client, url: str) -> httpx.Response:
    return client.post("/test/copy", json={"prompt": "", "image_url": url})


def _send_mask(client: httpx.Client, url: str) -> httpx.Response:
    return client.post("/test/inpaint", json={"prompt": "", "image_url": EXAMPLE_IMAGE, "mask_url": url})


def _send_lora(client: httpx.Client, url: str) -> httpx.Response:
    return client.post("/test/lora", json={"prompt": "", "loras": [{"path": url}]})


def _send_webhook(client: httpx.Client, url: str) -> httpx.Response:
    return client.post("/queue/test/null", params={"fal_webhook": url}, json={"prompt": ""})


def _by_redirect(send: Callable[[httpx.Client, str], httpx.Response]) -> Callable[[httpx.Client, str], httpx.Response]:
    """Return a sender that sends a URL on an allowed host, which redirects to the given URL."""
    return lambda client, url: send(client, f"http://public.test/to?{quote(url, safe='')}")


WAYS: Mapping[str, Callable[[httpx.Client, str], httpx.Response]] = {
    "image": _send_image,
    "mask": _send_mask,
    "lora": _send_lora,
    "webhook": _send_webhook,
    "image by redirect": _by_redirect(_send_image),
    "lora by redirect": _by_redirect(_send_lora),
}


def _client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False)


def _own_requests(server: Server) -> str:
    """Return the entry that this program's own requests leave in `TrafficRecorder.attempts`."""
    return f"tcp 127.0.0.1 {urlsplit(server.url).port}"


def _outcome(server: Server, response: httpx.Response) -> Any:
    """Return the status of a response or, for an accepted webhook, the error of its first attempt."""
    if response.status_code != 200 or "request_id" not in response.json():
        return response.status_code
    match = server.wait_for(rf"webhook attempt 1 failed: (\w+).*request_id={response.json()['request_id']}")
    return match[1]


def hostile(directory: str) -> Any:
    """Send each URL in each of WAYS; return the outcomes and all attempts on the network."""
    with serving(Path(directory), TEST_MODELS) as server, _client(server) as client, ThreadPoolExecutor(8) as threads:
        wire = TrafficRecorder()
        responses = {
            way: dict(zip(CORPUS, threads.map(lambda url, send=send: send(client, url), CORPUS), strict=True))
            for way, send in WAYS.items()
        }
        outcomes = {
            way: {url: _outcome(server, response) for url, response in each.items()} for way, each in responses.items()
        }
        outcomes["rebinding"] = {turn: _send_image(client, REBINDING).status_code for turn in ("first", "second")}
        return {"ends": outcomes, "tried": sorted(wire.attempts() - {_own_requests(server)})}


def allowed(directory: str) -> Any:
    """Send URLs to a server that may connect to every address; return the outcomes and all attempts on the network."""
    everything = "0.0.0.0/0,::/0"
    with serving(Path(directory), TEST_MODELS, outbound_allow=everything) as server, _client(server) as client:
        wire = TrafficRecorder()
        for url in (*INNER, *BY_NAME):
            _send_image(client, url)
        outcomes = {
            "image": _send_image(client, "http://10.0.0.1/image.png").status_code,
            "lora by redirect": WAYS["lora by redirect"](client, "http://192.168.0.1/lora.safetensors").status_code,
            "webhook": _send_webhook(client, "http://metadata.test/hook").status_code,
        }
        while 'flux_server_webhook_attempts_total{outcome="delivered"} 1.0' not in client.get("/metrics").text:
            continue
        return {"ends": outcomes, "tried": sorted(wire.attempts() - {_own_requests(server)})}


def local(directory: str) -> Any:
    """Generate with local weights of every kind: the demo, cached weights of the hub, and a directory.

    Returns the outputs, the network attempts so far, and the attempts of the whole run once one more request, with an
    image URL, has been sent.
    """
    for name in [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_", "DIFFUSERS_"))]:
        del os.environ[name]
    os.environ["HF_HOME"] = f"{directory}/hub"
    weights, data_dir = Path(directory) / "weights", Path(directory) / "own"
    cached(Path(directory) / "hub", "black-forest-labs/FLUX.1-dev", DEMO)
    cached(Path(directory) / "hub", "Falconsai/nsfw_image_detection", DEMO / "safety_checker")
    shutil.copytree(DEMO, weights, ignore=shutil.ignore_patterns("recipe", "safety_checker"))
    wire = TrafficRecorder()
    specs = ("demo", "black-forest-labs/FLUX.1-dev", f"fal-ai/flux/krea={weights}")
    with serving(data_dir, *specs) as server, _client(server) as client:
        body = {"prompt": "a red apple", "image_size": {"width": 64, "height": 64}, "num_inference_steps": 1}
        outputs = {name: client.post(f"/fal-ai/flux/{name}", json=body).json() for name in ("schnell", "dev", "krea")}
        tried = sorted(wire.attempts() - {_own_requests(server)})
        _send_image(client, "http://public.test/image.png")
        return {"ends": outputs, "tried": tried, "after": sorted(wire.attempts() - {_own_requests(server)})}


#: Names under fal's domains: some that clients use, and some that are made up.
FAL_NAMES = (
    "fal.run",
    "queue.fal.run",
    "rest.fal.ai",
    "v3.fal.media",
    "v3b.fal.media",
    "api.fal.ai",
    "fal.ai",
    "gateway.alpha.fal.ai",
    "fal.dev",
    "made-up.fal.run",
    "made-up.fal.dev",
    "far.too.deep.fal.media",
)


def turned_to_fal(directory: str, program: str, state: str) -> Any:
    """Use `flux-server run` to start a program that sends requests to fal's names.

    With the state "stopped", the server is stopped first. Returns the responses, all attempts on the network, and what
    `flux-server run` printed to stderr.
    """
    with serving_with_proxy(Path(directory), TEST_MODELS) as server:
        if state == "stopped":
            server.stop()
        node = ["node", str(Path(__file__).parent / "js" / "hosts.mjs")]
        python = [sys.executable, "-m", "tests.support.fal_host_calls"]
        settings = {f"FLUX_SERVER_{name}": value for name, value in server.settings.items()}
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **settings}
        wire = TrafficRecorder()
        command = [sys.executable, "-m", "server", "run", "--", *(node if program == "node" else python), *FAL_NAMES]
        process = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True)
        tried = {" ".join(attempt.split(" ")[:2]) for attempt in wire.attempts()}
        return {"answers": json.loads(process.stdout.splitlines()[-1]), "tried": sorted(tried), "notes": process.stderr}


def cached(home: Path, hub_id: str, directory: Path) -> Path:
    """Copy a directory into the hub client's cache, as links to blobs; return the snapshot's path."""
    repository = home / "hub" / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    # Skip Python files: the server downloads no code.
    for path in (path for path in directory.rglob("*") if path.is_file() and not path.suffix.startswith(".py")):
        link = snapshot / path.relative_to(directory)
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        for created in (link, blob):
            created.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


if __name__ == "__main__":
    route_everything_here()
    Resolver(NAMES)
    with catch_all_server(_files()) as requests:
        report = globals()[sys.argv[1]](*sys.argv[2:])
        print(json.dumps({**report, "asked": requests}))
