"""A fake Hugging Face hub that serves a repository with FLUX.1-dev's exact layout and tiny dimensions."""

import hashlib
import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
#: Small enough to split the two large components into several shards.
SHARD = "600KB"


def write_flux_dev(directory: Path) -> None:
    """Write the repository: sharded weights with indexes, tokenizers, scheduler, and files that `pull` must skip."""
    import torch
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

    from models.loading.specs import DEMO

    torch.manual_seed(3)
    demo = FluxPipeline.from_pretrained(DEMO, dtype=torch.bfloat16, local_files_only=True)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=demo.text_encoder_2.config.d_model,
        pooled_projection_dim=demo.text_encoder.config.hidden_size,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipeline = FluxPipeline(
        demo.scheduler,
        vae.to(torch.bfloat16),
        demo.text_encoder,
        demo.tokenizer,
        demo.text_encoder_2,
        demo.tokenizer_2,
        transformer.to(torch.bfloat16),
    )
    pipeline.save_pretrained(directory, max_shard_size=SHARD)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(directory / name)
        shutil.copytree(DEMO / name, directory / name)
    # Add files outside the pipeline, as the real repository has: single-file checkpoints, documents, images, pickles.
    for name in ("flux1-dev.safetensors", "ae.safetensors"):
        shutil.copy(DEMO / "vae" / "diffusion_pytorch_model.safetensors", directory / name)
    for name in ("README.md", "LICENSE.md", "dev_grid.jpg", "vae/diffusion_pytorch_model.bin"):
        (directory / name).write_bytes(b"not needed")


def write_checker(directory: Path) -> None:
    """Write the demo's safety checker as a separate repository."""
    from models.loading.specs import DEMO

    shutil.copytree(DEMO / "safety_checker", directory)


class Hub:
    """A server of repositories, which `repositories` maps from hub ids to directories.

    Attributes:
        gated: the ids of repositories that need the token.
        truncate_at: the bytes after which the first response for each weight file ends; None for whole responses.
        stalling_file: the file whose response stops halfway and sets `has_stalled`. The connection then stays open
            until `resume` is set, for 60 seconds at most.
    """

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.gated: set[str] = set()
        self.token = "hf_accepted"
        self.truncate_at: int | None = None
        self.stalling_file: str | None = None
        self.has_stalled = threading.Event()
        self.resume = threading.Event()
        self._truncated: set[str] = set()
        self.requested_files: list[str] = []
        self.ranges: list[str] = []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        if not self._thread.is_alive():
            return
        self.resume.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815  http.server calls this name

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = unquote(request.path.partition("?")[0])
        hub_id = next((name for name in self.repositories if f"/{name}/" in f"{path}/"), None)
        if hub_id is None:
            _refuse(request, 404, "RepoNotFound", "Repository not found")
        elif hub_id in self.gated and request.headers.get("authorization") != f"Bearer {self.token}":
            _refuse(request, 403, "GatedRepo", f"Access to model {hub_id} is restricted")
        elif path.startswith("/api/models/"):
            self._describe(request, path, self.repositories[hub_id])
        else:
            self._send(request, self.repositories[hub_id], re.split(r"/resolve/(?:main|" + COMMIT + ")/", path)[-1])

    def _describe(self, request: http.server.BaseHTTPRequestHandler, path: str, directory: Path) -> None:
        names = sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())
        if "/tree/" in path:
            listing: Any = [_entry(directory, name) for name in names]
        else:
            listing = {"id": "x", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        _reply(request, 200, json.dumps(listing).encode(), {"content-type": "application/json"})

    def _send(self, request: http.server.BaseHTTPRequestHandler, directory: Path, name: str) -> None:
        content = (directory / name).read_bytes() if (directory / name).is_file() else None
        if content is None:
            _refuse(request, 404, "EntryNotFound", "Entry not found")
            return
        headers = {"etag": f'"{hashlib.sha256(content).hexdigest()}"', "x-repo-commit": COMMIT}
        if request.command == "GET":
            self.requested_files.append(name)
        start = 0
        if byte_range := request.headers.get("range"):
            self.ranges.append(f"{name} {byte_range}")
            start = int(byte_range.removeprefix("bytes=").partition("-")[0])
            headers["content-range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        length = None
        if request.command == "GET" and name.endswith(".safetensors") and name not in self._truncated:
            length = self.truncate_at
            self._truncated.add(name)
        if request.command == "GET" and name == self.stalling_file:
            length = len(content) // 2
        _reply(request, 206 if byte_range else 200, content[start:], headers, length)
        if name == self.stalling_file and length is not None:
            request.wfile.flush()
            self.has_stalled.set()
            self.resume.wait(60)


def _entry(directory: Path, name: str) -> dict[str, Any]:
    content = (directory / name).read_bytes()
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _refuse(request: http.server.BaseHTTPRequestHandler, status: int, code: str, message: str) -> None:
    headers = {"x-error-code": code, "x-error-message": message, "content-type": "application/json"}
    _reply(request, status, json.dumps({"error": message}).encode(), headers)


def _reply(
    request: http.server.BaseHTTPRequestHandler,
    status: int,
    content: bytes,
    headers: dict[str, str],
    length: int | None = None,
) -> None:
    request.send_response(status)
    for name, value in {**headers, "content-length": str(len(content))}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content[:length])
    if length is not None and length < len(content):
        request.close_connection = True


@contextmanager
def running_hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    """Run a hub until the block ends."""
    hub = Hub(repositories)
    try:
        yield hub
    finally:
        hub.close()
