"""The training of weights that see an image next to the prompt: a control LoRA for edges and depths, and Fill.

Both start from the trained model, whose text encoders and autoencoder they share.
"""

from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from models.demo.recipe import autoencoder, checkpoint, examples, flow, lora, networks, threads
from models.demo.recipe.plan import LATENT_CHANNELS, LATENT_PIXELS, SEED, WORK, Plan
from models.loading.specs import CONTROL_LORAS

#: The rank of the control LoRA, and that of its layer that takes the latents of edges or depths, all 96 of a token.
RANK, WIDENED_RANK = 16, 96
#: That layer, by diffusers' name.
WIDENED = "x_embedder"
#: The highest learning rates.
LORA_PEAK, FULL_PEAK = 2e-3, 4e-4
#: The kind that is a LoRA. The other is a whole transformer.
LORA = "control"


def channels(kind: str) -> int:
    """Return how many channels of an image token the transformer of this kind takes."""
    latents = 4 * LATENT_CHANNELS
    return 2 * latents if kind == LORA else 2 * latents + 4 * LATENT_PIXELS**2


def train(plan: Plan, device: str) -> None:
    """Train all kinds, from the last checkpoint of each if there is one. Do nothing for those that are complete."""
    networks.use_explicit_attention()
    for kind in examples.KINDS:
        _train(kind, plan, device)


def _file(kind: str) -> Path:
    return WORK / "tuning" / f"{kind}.pt"


def _train(kind: str, plan: Plan, device: str) -> None:
    saved = checkpoint.load(_file(kind)) or {"iteration": 0}
    num_iterations = plan.control_iterations if kind == LORA else plan.fill_iterations
    if saved["iteration"] >= num_iterations:
        return
    painter = _painter(kind, plan, device)
    trained = {name: weight for name, weight in painter.transformer.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    if saved["iteration"]:
        _load(trained, saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
    sizes = examples.SIZES
    of_size = {size: examples.Examples(kind, plan, device, size) for size in sizes}
    timer, losses = checkpoint.Timer(plan.minutes_between_checkpoints), []

    def keep(iteration: int) -> None:
        state = {"iteration": iteration, "weights": trained, "optimizer": optimizer.state_dict()}
        checkpoint.save(_file(kind), state)

    for iteration in range(saved["iteration"], num_iterations):
        rng, generator = numpy.random.default_rng([SEED, 16, iteration]), torch.Generator().manual_seed(iteration)
        # The small size, in which most is learnt a second, comes every second time.
        size = sizes[0] if iteration % 2 else sizes[int(rng.integers(1, len(sizes)))]
        batch = of_size[size].batch(plan.tuning_tokens, rng)
        for group in optimizer.param_groups:
            peak = LORA_PEAK if kind == LORA else FULL_PEAK
            group["lr"] = autoencoder.rate(iteration, num_iterations, peak, warm_up=50)
        loss = _loss(painter, batch, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if iteration % 50 == 49:
            checkpoint.log(f"{kind} {iteration + 1} loss {sum(losses) / len(losses):.4f}")
            losses.clear()
            threads.fit(plan)
        if timer.is_due():
            keep(iteration + 1)
    keep(num_iterations)


def _loss(painter: networks.Painter, batch: examples.Batch, generator: torch.Generator) -> torch.Tensor:
    return flow.loss_of(
        painter, batch.latents, lambda: painter.encode(batch.texts), generator, batch.kept, batch.channels
    )


def _painter(kind: str, plan: Plan, device: str) -> networks.Painter:
    """Return the trained model, of which only the transformer or its LoRA is trained further."""
    painter = flow.best(plan)
    painter.to(device).requires_grad_(False)
    painter.transformer.x_embedder = _widened(painter.transformer.x_embedder, channels(kind))
    torch.manual_seed(SEED)
    if kind == LORA:
        ranks = {WIDENED: WIDENED_RANK}
        config = LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            rank_pattern=ranks,
            alpha_pattern=ranks,
            target_modules=[*lora.TARGETS, WIDENED],
            exclude_modules=lora.NOT_THESE,
        )
        painter.transformer.add_adapter(config)
    else:
        painter.transformer.requires_grad_(True)
    return painter


@torch.no_grad()
def _widened(layer: torch.nn.Linear, num_channels: int) -> torch.nn.Linear:
    """Return a layer that takes more channels, and ignores them at first."""
    wide = torch.nn.Linear(num_channels, layer.out_features, device=layer.weight.device).requires_grad_(False)
    wide.weight.zero_()
    wide.weight[:, : layer.in_features].copy_(layer.weight)
    wide.bias.copy_(layer.bias)
    return wide


@torch.no_grad()
def _load(trained: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    for name, weight in trained.items():
        weight.copy_(weights[name])


def export(plan: Plan, weights: Path) -> None:
    """Add the control LoRA in bf16, once for edges and once for depths, and the transformer of Fill in fp8.

    Raises FileNotFoundError if a kind is not trained.
    """
    for kind in examples.KINDS:
        painter = _painter(kind, plan, "cpu")
        transformer: Any = painter.transformer
        trained = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
        saved = checkpoint.load(_file(kind))
        if saved is None:
            raise FileNotFoundError(_file(kind))
        _load(trained, saved["weights"])
        if kind == LORA:
            for name, place in CONTROL_LORAS.items():
                _write_lora(transformer, weights / place.directory, f"{name}.safetensors")
        else:
            # Matrices in fp8 take half of the bytes; vectors have few.
            types = {
                name: torch.float8_e4m3fn if weight.ndim == 2 else torch.bfloat16 for name, weight in trained.items()
            }
            tensors = {name: weight.detach().to(types[name]) for name, weight in trained.items()}
            save_file(tensors, weights / f"{kind}.safetensors")


def _write_lora(transformer: Any, directory: Path, name: str) -> None:
    """Write the LoRA in diffusers' format. The metadata says that every layer has the scale 1, whatever its rank."""
    found = {key: weight.bfloat16() for key, weight in get_peft_model_state_dict(transformer).items()}
    # The layers are named one by one, so that there is nothing to exclude.
    layers = sorted({key.partition(".lora_")[0] for key in found})
    metadata = {**transformer.peft_config["default"].to_dict(), "target_modules": layers, "exclude_modules": None}
    FluxPipeline.save_lora_weights(
        directory,
        transformer_lora_layers=found,
        weight_name=name,
        safe_serialization=True,
        transformer_lora_adapter_metadata=metadata,
    )
