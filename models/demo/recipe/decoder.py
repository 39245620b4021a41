"""A second, longer lesson for the decoder alone: the encoder stays, so the flow's latents keep their meaning."""

import numpy
import torch

from models.demo.recipe import autoencoder, checkpoint, precision, threads
from models.demo.recipe.plan import SEED, WORK, Plan

PEAK = 6e-4
#: Most noise on the latents: a painted picture's are further off than an encoded one's.
NOISE = 0.25
#: Kept apart from the autoencoder's numbers, so that the crops are others.
FIRST_CROP = 1_000_000


def train(plan: Plan, device: str) -> None:
    """Train from the last checkpoint to the end; returns at once where it is done."""
    vae = autoencoder.load(device)
    decoder = vae.decoder.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    saved, start = checkpoint.load(autoencoder.DECODER_FILE), 0
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["iteration"]
    crops, timer, errors = autoencoder.Crops(plan), checkpoint.Timer(plan.minutes_between_checkpoints), []
    for iteration in range(start, plan.decoder_iterations):
        torch.manual_seed(SEED + iteration)
        for group in optimizer.param_groups:
            group["lr"] = autoencoder.rate(iteration, plan.decoder_iterations, PEAK)
        pixels = crops.batch(FIRST_CROP + iteration).to(device, memory_format=torch.channels_last)
        with precision.mixed(device):
            with torch.no_grad():
                latents = vae.encode(pixels, return_dict=False)[0].float()
            strength = float(numpy.random.default_rng([SEED, 8, iteration]).uniform(0, NOISE))
            decoded = vae.decode(latents + strength * torch.randn_like(latents), return_dict=False)[0].float()
        loss, error = autoencoder.difference(decoded, pixels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        errors.append(error)
        if iteration % 100 == 99:
            checkpoint.log(f"decoder {iteration + 1} L1 {sum(errors) / len(errors):.4f}")
            errors.clear()
            threads.fit(plan)
        if timer.is_due() or iteration + 1 == plan.decoder_iterations:
            state = {"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration + 1}
            checkpoint.save(autoencoder.DECODER_FILE, state)
            autoencoder.sheet(vae, plan, device, WORK / "sheets" / "decoder.png")
