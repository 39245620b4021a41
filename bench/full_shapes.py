"""Loads a folder in FLUX.1 [dev]'s layout and true shapes: 34 GB of random numbers, sharded and indexed as on the hub.

    python -m bench.full_shapes FOLDER [--steps 1] [--side 256] [--device cpu]

Writes the folder if it is not there, loads it as `serve` does, says what memory that took, and paints one picture.
"""

import argparse
import json
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from models.base import EngineConfig, LoadProgress
from models.benchmark import random_weights
from models.flux import safety_checker
from models.flux.acceleration import Tier
from models.flux.engine import FluxEngine
from models.loading import devices
from models.loading.pipeline import load_pipeline
from models.loading.specs import DEMO

_SHARD = 9_900_000_000


def write(folder: Path) -> None:
    """The folder, one shard after the other, so that none of the parts is ever held whole."""
    with torch.device("meta"):
        parts = random_weights.parts("full")
    folder.mkdir(parents=True)
    for name in ("scheduler", "tokenizer", "tokenizer_2"):
        shutil.copytree(DEMO / name, folder / name)
    index = json.loads((DEMO / "model_index.json").read_text(encoding="utf-8"))
    index["vae"] = ["diffusers", "AutoencoderKL"]
    for name, part in parts.items():
        (folder / name).mkdir()
        (part.config.save_pretrained if hasattr(part.config, "save_pretrained") else part.save_config)(folder / name)
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        _write_shards(folder / name, stem, part)
        print(f"wrote {name}", flush=True)
    # Last, because it says that the folder is whole.
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_shards(folder: Path, stem: str, part: Any) -> None:
    shards: list[dict[str, Any]] = [{}]
    room = _SHARD
    for name, parameter in part.named_parameters():
        num_bytes = 2 * parameter.numel()
        if num_bytes > room:
            shards.append({})
            room = _SHARD
        shards[-1][name] = parameter.shape
        room -= num_bytes
    names = [f"{stem}-{index + 1:05}-of-{len(shards):05}.safetensors" for index in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    generator = torch.Generator().manual_seed(0)
    for file, shard in zip(names, shards, strict=True):
        tensors = {name: _random(shape, generator) for name, shape in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(2 * parameter.numel() for parameter in part.parameters())
        listed = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(listed), encoding="utf-8")


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.bfloat16)
    bound = (3 * shape[0] / shape.numel()) ** 0.5
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


def main() -> None:
    """Print what loading and painting took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if not (options.folder / "model_index.json").is_file():
        write(options.folder)
    begun = time.perf_counter()
    pipeline, plan = load_pipeline(EngineConfig(options.folder, "", options.device, "resident", report=_say))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"loaded in {time.perf_counter() - begun:.1f} s, plan {plan.name}, host memory at most {peak:.1f} GB")
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            print(f"{name}: {sum(weight.numel() for weight in part.parameters()) / 1e9:.3f} billion parameters")
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
    painting = engine.start(request, 1)
    while painting.step < painting.num_steps:
        begun = time.perf_counter()
        engine.advance(painting)
        print(f"step {painting.step} in {time.perf_counter() - begun:.1f} s", flush=True)
    engine.decode(painting)
    print(f"painted {painting.images[0].size}")


def _say(loading: LoadProgress) -> None:
    print(f"loading {loading.component}, {loading.loaded_bytes / 1e9:.1f} of {loading.total_bytes / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
