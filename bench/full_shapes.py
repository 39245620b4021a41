"""A test of loading 34 GB of random numbers in the shapes of FLUX.1 [dev], in shards with an index as on the hub.

    python -m bench.full_shapes DIRECTORY [--gguf Q4_K] [--quantize int4] [--steps 1] [--side 256] [--device cpu]

Writes the directory if it is missing, loads it as `serve` does, prints the peak memory, and generates one image unless
there are no steps. With `--gguf`, the transformer is a single file of random blocks of this type, for which the
directory is the base.
"""

import argparse
import contextlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from models.base import EngineConfig, LoadProgress, SingleFile, Weights
from models.benchmark import random_weights
from models.flux import safety_checker
from models.flux.acceleration import Tier
from models.flux.engine import FluxEngine
from models.loading import devices
from models.loading.pipeline import load_pipeline
from models.loading.specs import DEMO
from tests.support import single_files

_SHARD_BYTES = 9_900_000_000


def write(directory: Path) -> None:
    """Write the directory shard by shard, so that no more than one shard is in memory."""
    with torch.device("meta"):
        parts = random_weights.parts("full")
    directory.mkdir(parents=True)
    for name in ("scheduler", "tokenizer", "tokenizer_2"):
        shutil.copytree(DEMO / name, directory / name)
    index = json.loads((DEMO / "model_index.json").read_text(encoding="utf-8"))
    index["vae"] = ["diffusers", "AutoencoderKL"]
    for name, part in parts.items():
        (directory / name).mkdir()
        (part.config.save_pretrained if hasattr(part.config, "save_pretrained") else part.save_config)(directory / name)
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        _write_shards(directory / name, stem, part)
        print(f"wrote {name}", flush=True)
    # Written last: this file marks the directory as complete.
    (directory / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_shards(directory: Path, stem: str, part: Any) -> None:
    shards: list[dict[str, Any]] = [{}]
    free_bytes = _SHARD_BYTES
    for name, parameter in part.named_parameters():
        num_bytes = 2 * parameter.numel()
        if num_bytes > free_bytes:
            shards.append({})
            free_bytes = _SHARD_BYTES
        shards[-1][name] = parameter.shape
        free_bytes -= num_bytes
    names = [f"{stem}-{index + 1:05}-of-{len(shards):05}.safetensors" for index in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    generator = torch.Generator().manual_seed(0)
    for file, shard in zip(names, shards, strict=True):
        tensors = {name: _random(shape, generator) for name, shape in shard.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(2 * parameter.numel() for parameter in part.parameters())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.bfloat16)
    bound = (3 * shape[0] / shape.numel()) ** 0.5
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


def write_gguf(path: Path, kind: str) -> None:
    """Write a transformer whose matrices are random blocks of a K-quant; other tensors are in float32."""
    with torch.device("meta"):
        transformer = random_weights.parts("full")["transformer"]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in transformer.named_parameters():
        becomes_blocks = parameter.dim() == 2 and parameter.shape[1] % 256 == 0
        tensors[name] = parameter.data if becomes_blocks else _random(parameter.shape, generator)
    single_files.write_gguf(path, tensors, kind)
    print(f"wrote {path.stat().st_size / 1e9:.2f} GB of {kind}", flush=True)


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Measure ten times a second, while the block runs, the bytes of memory in use, without those that files fill.

    Yields a list with the highest number.
    """
    peak, is_over = [0.0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.1):
            found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
            peak[0] = max(peak[0], 1024 * float(found[1]) if found else 0.0)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()


def main() -> None:
    """Print the time and memory of loading and the time of each step of an image."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gguf", choices=("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"))
    parser.add_argument("--quantize", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if not (options.directory / "model_index.json").is_file():
        write(options.directory)
    weights: Weights = options.directory
    if options.gguf:
        file = options.directory.with_name(f"{options.directory.name}-{options.gguf}.gguf")
        if not file.is_file():
            write_gguf(file, options.gguf)
        weights = SingleFile(file, options.directory)
    memory = "resident" if options.quantize == "none" else options.quantize
    start = time.perf_counter()
    config = EngineConfig(weights, "", options.device, memory=memory, quantize=options.quantize, report=_report)
    with peak_memory() as peak:
        pipeline, plan = load_pipeline(config)
    seconds = time.perf_counter() - start
    print(f"loaded in {seconds:.1f} s, plan {plan.name}, at most {peak[0] / 1e9:.2f} GB of memory besides the files")
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            print(f"{name}: {sum(weight.numel() for weight in part.parameters()) / 1e9:.3f} billion parameters")
    if not options.steps:
        return
    device = devices.device_for(options.device)
    engine = FluxEngine(pipeline, safety_checker.Unavailable(""), [Tier("none", pipeline.transformer)], device)
    size = SimpleNamespace(width=options.side, height=options.side)
    request = SimpleNamespace(
        prompt="a red apple",
        image_size=size,
        num_inference_steps=options.steps,
        num_images=1,
        guidance_scale=3.5,
        acceleration="none",
    )
    task = engine.start(request, 1)
    while task.step < task.num_steps:
        start = time.perf_counter()
        engine.advance(task)
        print(f"step {task.step} in {time.perf_counter() - start:.1f} s", flush=True)
    engine.decode(task)
    print(f"generated an image of {task.images[0].size} pixels")


def _report(progress: LoadProgress) -> None:
    print(f"loading {progress.component}, {progress.loaded_bytes / 1e9:.1f} of {progress.total_bytes / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
