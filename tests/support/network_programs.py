"""Programs for a network of their own: `python -m tests.support.network_programs PROGRAM ARGUMENT...` prints JSON."""

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
from tests.support.fake_hub import COMMIT
from tests.support.network import PUBLIC, Resolver, Wire, canary, lead_everything_here
from tests.support.server_process import ROOT, TEST_MODELS, Server, serving, with_door
from tests.unit.inputs.test_loras import GOOD
from tests.unit.net.test_outbound import FORBIDDEN, INNER

#: Each name's answers, one after the other.
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
    # Public to whoever looks first, inner to whoever looks again.
    "rebinding.test": [[PUBLIC], ["10.0.0.1"]],
}
#: Nothing is wrong with these until their names are looked up.
BY_NAME = [f"http://{name}/" for name in NAMES if name not in ("public.test", "rebinding.test")]
BY_NAME += ["http://localhost/", "http://0x7f.1/", "http://0x7f000001/"]
REBINDING = "http://rebinding.test/picture.png"
CORPUS = [*filter(None, FORBIDDEN), *BY_NAME]


def _files() -> dict[str, bytes]:
    """What the web server at every address has."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    return {"/picture.png": picture.getvalue(), "/lora.safetensors": GOOD}


def _picture(client: httpx.Client, url: str) -> httpx.Response:
    return client.post("/test/copy", json={"prompt": "", "image_url": url})


def _lora(client: httpx.Client, url: str) -> httpx.Response:
    return client.post("/test/lora", json={"prompt": "", "loras": [{"path": url}]})


def _webhook(client: httpx.Client, url: str) -> httpx.Response:
    return client.post("/queue/test/null", params={"fal_webhook": url}, json={"prompt": ""})


def _sent_on(way: Callable[[httpx.Client, str], httpx.Response]) -> Callable[[httpx.Client, str], httpx.Response]:
    """By a host that may be reached."""
    return lambda client, url: way(client, f"http://public.test/to?{quote(url, safe='')}")


WAYS: Mapping[str, Callable[[httpx.Client, str], httpx.Response]] = {
    "picture": _picture,
    "lora": _lora,
    "webhook": _webhook,
    "picture by redirect": _sent_on(_picture),
    "lora by redirect": _sent_on(_lora),
}


def _client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False)


def _own(server: Server) -> str:
    """How the wire calls our own requests."""
    return f"tcp 127.0.0.1 {urlsplit(server.url).port}"


def _end(server: Server, answer: httpx.Response) -> Any:
    """The status of a refusal, or for a webhook what became of its first attempt."""
    if answer.status_code != 200 or "request_id" not in answer.json():
        return answer.status_code
    said = server.wait_for(rf"webhook, attempt 1: (\w+).*request_id={answer.json()['request_id']}")
    return said[1]


def hostile(folder: str) -> Any:
    """What became of each address in each way, and all that was tried on the wire."""
    with serving(Path(folder), TEST_MODELS) as server, _client(server) as client, ThreadPoolExecutor(8) as clients:
        wire = Wire()
        answers = {
            way: dict(zip(CORPUS, clients.map(lambda url, send=send: send(client, url), CORPUS), strict=True))
            for way, send in WAYS.items()
        }
        found = {way: {url: _end(server, answer) for url, answer in each.items()} for way, each in answers.items()}
        found["rebinding"] = {turn: _picture(client, REBINDING).status_code for turn in ("first", "second")}
        return {"ends": found, "tried": sorted(wire.tried() - {_own(server)})}


def allowed(folder: str) -> Any:
    """The same of a server that may reach everything: whom it reached, and what became of good requests."""
    everything = "0.0.0.0/0,::/0"
    with serving(Path(folder), TEST_MODELS, outbound_allow=everything) as server, _client(server) as client:
        wire = Wire()
        for url in (*INNER, *BY_NAME):
            _picture(client, url)
        found = {
            "picture": _picture(client, "http://10.0.0.1/picture.png").status_code,
            "lora by redirect": WAYS["lora by redirect"](client, "http://192.168.0.1/lora.safetensors").status_code,
            "webhook": _webhook(client, "http://metadata.test/hook").status_code,
        }
        while 'flux_server_webhook_attempts_total{outcome="delivered"} 1.0' not in client.get("/metrics").text:
            continue
        return {"ends": found, "tried": sorted(wire.tried() - {_own(server)})}


def local(folder: str) -> Any:
    """Weights of every kind that are here: what was tried while they were loaded and painted, and after that."""
    for name in [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_", "DIFFUSERS_"))]:
        del os.environ[name]
    os.environ["HF_HOME"] = f"{folder}/hub"
    weights, own = Path(folder) / "weights", Path(folder) / "own"
    cached(Path(folder) / "hub", "black-forest-labs/FLUX.1-dev", DEMO)
    cached(Path(folder) / "hub", "Falconsai/nsfw_image_detection", DEMO / "safety_checker")
    shutil.copytree(DEMO, weights, ignore=shutil.ignore_patterns("recipe", "safety_checker"))
    wire = Wire()
    specs = ("demo", "black-forest-labs/FLUX.1-dev", f"fal-ai/flux/krea={weights}")
    with serving(own, *specs) as server, _client(server) as client:
        body = {"prompt": "a red apple", "image_size": {"width": 64, "height": 64}, "num_inference_steps": 1}
        ends = {name: client.post(f"/fal-ai/flux/{name}", json=body).json() for name in ("schnell", "dev", "krea")}
        tried = sorted(wire.tried() - {_own(server)})
        _picture(client, "http://public.test/picture.png")
        return {"ends": ends, "tried": tried, "after": sorted(wire.tried() - {_own(server)})}


#: Under fal's domains: those that clients use, and made-up ones.
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


def turned_to_fal(folder: str, program: str, state: str) -> Any:
    """What a program that `run` starts was answered under fal's names, and all that was tried on the wire."""
    with with_door(Path(folder), TEST_MODELS) as server:
        if state == "stopped":
            server.stop()
        node = ["node", str(Path(__file__).parent / "js" / "hosts.mjs")]
        python = [sys.executable, "-m", "tests.support.fal_host_calls"]
        settings = {f"FLUX_SERVER_{name}": value for name, value in server.settings.items()}
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **settings}
        wire = Wire()
        command = [sys.executable, "-m", "server", "run", "--", *(node if program == "node" else python), *FAL_NAMES]
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True)
        tried = {" ".join(each.split(" ")[:2]) for each in wire.tried()}
        return {"answers": json.loads(done.stdout.splitlines()[-1]), "tried": sorted(tried), "notes": done.stderr}


def cached(home: Path, hub_id: str, folder: Path) -> Path:
    """A folder as the hub's own client keeps what it pulled: links to blobs. Returns where it is read."""
    repository = home / "hub" / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    # No code: nothing of the kind is pulled.
    for path in (path for path in folder.rglob("*") if path.is_file() and not path.suffix.startswith(".py")):
        link = snapshot / path.relative_to(folder)
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        for made in (link, blob):
            made.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


if __name__ == "__main__":
    lead_everything_here()
    Resolver(NAMES)
    with canary(_files()) as asked:
        report = globals()[sys.argv[1]](*sys.argv[2:])
        print(json.dumps({**report, "asked": asked}))
