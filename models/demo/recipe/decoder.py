"""The further training of the decoder. The encoder does not change, so latents keep their meaning for the flow."""

import numpy
import torch

from models.demo.recipe import autoencoder, checkpoint, precision, threads
from models.demo.recipe.plan import SEED, WORK, Plan

#: The highest learning rate.
PEAK = 3e-4
#: The maximum noise on the latents. Generated latents have larger errors than encoded ones.
NOISE = 0.25
#: The iteration number of the first crops, far from the numbers of the autoencoder's training, so that crops differ.
FIRST_CROP = 1_000_000


def train(plan: Plan, device: str) -> None:
    """Train the decoder, from the last checkpoint if there is one. Do nothing if the training is complete."""
    vae = autoencoder.load(device)
    decoder = vae.decoder.train().requires_grad_(True)
    optimizer = autoencoder.optimizer_of(decoder, device)
    saved, start = checkpoint.load(autoencoder.DECODER_FILE), 0
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["iteration"]
    crops, timer, errors = autoencoder.Crops(plan), checkpoint.Timer(plan.minutes_between_checkpoints), []
    for iteration in range(start, plan.decoder_iterations):
        torch.manual_seed(SEED + iteration)
        pixels = crops.batch(FIRST_CROP + iteration).to(device, memory_format=torch.channels_last)
        with precision.mixed(device):
            with torch.no_grad():
                latents = vae.encode(pixels, return_dict=False)[0].float()
            strength = float(numpy.random.default_rng([SEED, 8, iteration]).uniform(0, NOISE))
            decoded = vae.decode(latents + strength * torch.randn_like(latents), return_dict=False)[0].float()
        loss, error = autoencoder.difference(decoded, pixels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step(autoencoder.rate(iteration, plan.decoder_iterations, PEAK))
        errors.append(error)
        if iteration % 100 == 99:
            checkpoint.log(f"decoder {iteration + 1} L1 {sum(errors) / len(errors):.4f}")
            errors.clear()
            threads.fit(plan)
        if timer.is_due() or iteration + 1 == plan.decoder_iterations:
            state = {"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration + 1}
            checkpoint.save(autoencoder.DECODER_FILE, state)
            autoencoder.sheet(vae, plan, device, WORK / "sheets" / "decoder.png")
