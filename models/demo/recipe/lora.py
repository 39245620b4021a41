"""A tiny LoRA for trying LoRAs out: with it, the demo weights generate images in shades of grey."""

from typing import Any

import numpy
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL.Image import Image

from models.demo.recipe import autoencoder, captions, checkpoint, flow, networks, pool, render, scenes, threads
from models.demo.recipe.objects import all_objects
from models.demo.recipe.plan import OTHER_SIZES, SEED, WORK, Plan

FILE = WORK / "lora" / "grey.safetensors"
RANK, BATCH, PEAK = 4, 12, 2e-3
#: The sizes of successive batches: every third batch is of the larger size.
SIZES = (OTHER_SIZES[0], OTHER_SIZES[0], (512, 512))
#: The layers that get a LoRA: attention and feed-forward of joint and single blocks, by diffusers' names.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"]
#: The transformer's last layer, which gets no LoRA although it has the same name as a layer of the single blocks.
NOT_THESE = r"^proj_out$"


def grey(picture: Image) -> Image:
    """Return an image in shades of grey."""
    return picture.convert("L").convert("RGB")


def chroma(picture: Image) -> float:
    """Return the difference between a pixel's largest and smallest colour value, 0 to 255, on average."""
    pixels = numpy.asarray(picture, dtype=numpy.int16)
    return float((pixels.max(axis=2) - pixels.min(axis=2)).mean())


@torch.no_grad()
def _examples(plan: Plan, device: str, size: pool.Size) -> tuple[list[scenes.Scene], torch.Tensor]:
    """Return random scenes, and the unscaled latents of their grey renders in this size."""
    things, vae = all_objects(plan.scale), autoencoder.load(device)
    icons = {thing.name: thing.icon for thing in things}
    rng = numpy.random.default_rng([SEED, 10, size[0]])
    found = [scenes.sample(things, rng) for _ in range(plan.lora_examples)]
    latents = [
        vae.encode(autoencoder.to_tensor([grey(render.render(scene, icons, *size))]).to(device), return_dict=False)[0]
        for scene in found
    ]
    return found, torch.cat(latents)


def _adapted(plan: Plan, device: str) -> networks.Painter:
    """Return the model that is exported, frozen, with a LoRA that changes nothing yet."""
    painter = flow.best(plan)
    painter.to(device).requires_grad_(False)
    torch.manual_seed(SEED)
    painter.transformer.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, exclude_modules=NOT_THESE)
    )
    return painter


def train(plan: Plan, device: str) -> None:
    """Train the LoRA without checkpoints, in a few minutes. Do nothing if the result exists."""
    if FILE.is_file():
        return
    things = {thing.name: thing for thing in all_objects(plan.scale)}
    examples = {size: _examples(plan, device, size) for size in set(SIZES)}
    scaling, shift = pool.statistics()
    painter = _adapted(plan, device)
    weights = [weight for weight in painter.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0)
    losses: list[float] = []
    for iteration in range(plan.lora_iterations):
        rng = numpy.random.default_rng([SEED, 11, iteration])
        size = SIZES[iteration % len(SIZES)]
        found, latents = examples[size]
        chosen = rng.integers(len(found), size=BATCH if size == SIZES[0] else BATCH // 4)
        texts = [captions.caption(found[place], things, rng) for place in chosen]
        for group in optimizer.param_groups:
            group["lr"] = autoencoder.rate(iteration, plan.lora_iterations, PEAK, warm_up=20)
        generator = torch.Generator().manual_seed(SEED + iteration)
        scaled = (latents[torch.from_numpy(chosen)] - shift) * scaling
        loss = flow.loss_of(painter, scaled, lambda: painter.encode(texts), generator)  # noqa: B023  called at once
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if iteration % 50 == 49:
            checkpoint.log(f"lora {iteration + 1} loss {sum(losses) / len(losses):.4f}")
            losses.clear()
            threads.fit(plan)
    _write(painter.transformer)


def _write(transformer: Any) -> None:
    """Write the LoRA in diffusers' format, in bf16."""
    found = {name: weight.bfloat16() for name, weight in get_peft_model_state_dict(transformer).items()}
    FluxPipeline.save_lora_weights(
        FILE.parent, transformer_lora_layers=found, weight_name=FILE.name, safe_serialization=True
    )
