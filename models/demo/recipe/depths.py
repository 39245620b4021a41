"""A tiny Depth Anything for the demo: it finds the object in an image, and says that it is nearer than the rest."""

from pathlib import Path

import numpy
import torch
from PIL import Image
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from models.demo.recipe import autoencoder, checkpoint, render, scenes, threads, tokens
from models.demo.recipe.objects import Object, all_objects
from models.demo.recipe.plan import SEED, WORK, Plan

FILE = WORK / "depths.pt"
#: The shorter side of its input, and the side of a patch of it, in pixels.
PIXELS, PATCH = 168, 14
#: The mean and deviation of the values of each colour in its input, from 0 to 1.
MEAN, DEVIATION = 0.5, 0.5
BATCH, PEAK = 12, 1e-3


def build() -> DepthAnythingForDepthEstimation:
    """Build the network. It takes images in which both sides are multiples of PATCH."""
    backbone = Dinov2Config(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=PIXELS,
        patch_size=PATCH,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=64,
        neck_hidden_sizes=[16, 24, 32, 32],
        fusion_hidden_size=24,
        head_hidden_size=16,
    )
    return DepthAnythingForDepthEstimation(config)


def train(plan: Plan, device: str) -> None:
    """Train the network without checkpoints, in a few minutes. Do nothing if the result exists."""
    if FILE.is_file():
        return
    torch.manual_seed(SEED)
    network = build().to(device).train()
    # The last layer has no gradient where its outputs are negative, so they start positive.
    torch.nn.init.constant_(network.head.conv3.bias, 0.3)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=0.01)
    things = all_objects(plan.scale)
    icons = {thing.name: thing.icon for thing in things}
    losses: list[float] = []
    for iteration in range(plan.depth_iterations):
        rng = numpy.random.default_rng([SEED, 14, iteration])
        pixels, wanted = _batch(things, icons, rng)
        for group in optimizer.param_groups:
            group["lr"] = autoencoder.rate(iteration, plan.depth_iterations, PEAK, warm_up=50)
        found = network(pixel_values=pixels.to(device)).predicted_depth
        loss = (found - wanted.to(device)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if iteration % 50 == 49:
            checkpoint.log(f"depths {iteration + 1} loss {sum(losses) / len(losses):.4f}")
            losses.clear()
            threads.fit(plan)
    checkpoint.save(FILE, network.state_dict())


def _batch(
    things: tuple[Object, ...], icons: dict[str, str], rng: numpy.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images of one size as the network takes them, (images, 3, height, width), and their depths from 0 to 1."""
    width, height = ((512, 512), (640, 512), (512, 640), (768, 512))[int(rng.integers(4))]
    inner = (round(width / 512 * PIXELS / PATCH) * PATCH, round(height / 512 * PIXELS / PATCH) * PATCH)
    found = [scenes.sample(things, rng) for _ in range(BATCH)]
    pictures = [render.render(scene, icons, width, height).resize(inner, Image.Resampling.BICUBIC) for scene in found]
    depths = [render.silhouettes(scene, icons, width, height).convert("L").resize(inner) for scene in found]
    return autoencoder.to_tensor(pictures), torch.from_numpy(
        numpy.stack([numpy.asarray(each) for each in depths])
    ) / 255


def export(directory: Path) -> None:
    """Write the network, in bf16, and its image processor. Raises FileNotFoundError if it is not trained."""
    saved = checkpoint.load(FILE)
    if saved is None:
        raise FileNotFoundError(FILE)
    network = build()
    network.load_state_dict(saved)
    network.to(torch.bfloat16).save_pretrained(directory)
    processor = {
        "image_processor_type": "DPTImageProcessor",
        "do_resize": True,
        "size": {"height": PIXELS, "width": PIXELS},
        "keep_aspect_ratio": True,
        "ensure_multiple_of": PATCH,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [DEVIATION] * 3,
        "do_pad": False,
    }
    tokens.write_json(directory / "preprocessor_config.json", processor)
