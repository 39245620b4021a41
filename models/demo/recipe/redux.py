"""Redux for the demo: a tiny SigLIP whose tokens let the transformer draw what an image shows, without a prompt."""

from pathlib import Path

import numpy
import torch
import transformers
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image

from models.demo.recipe import autoencoder, checkpoint, flow, networks, pool, render, scenes, tokens
from models.demo.recipe.objects import Object, all_objects
from models.demo.recipe.plan import OTHER_SIZES, SEED, TEXT_WIDTH, WORK, Plan
from models.flux.prompt_cache import FLUX_TEXT_TOKENS
from models.loading.specs import REDUX

FILE = WORK / "redux.pt"
#: The classes that FluxPriorReduxPipeline loads.
CLASSES = {
    "_class_name": "FluxPriorReduxPipeline",
    "feature_extractor": ["transformers", "SiglipImageProcessor"],
    "image_embedder": ["flux", "ReduxImageEncoder"],
    "image_encoder": ["transformers", "SiglipVisionModel"],
}
#: The sides of the image encoder's input and of a patch of it, in pixels. Each patch becomes one token.
PIXELS, PATCH = 96, 16
BATCH, PEAK = 12, 1e-3
#: The sizes in pixels of successive batches of drawn images: every third batch is of the larger size.
SIZES = (OTHER_SIZES[0], OTHER_SIZES[0], (512, 512))


class Prior(torch.nn.Module):  # type: ignore[misc]
    """The networks of FluxPriorReduxPipeline: they turn an image into tokens for the transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=PIXELS,
                patch_size=PATCH,
                vision_use_head=False,
            )
        )
        self.image_embedder = ReduxImageEncoder(redux_dim=TEXT_WIDTH, txt_in_features=TEXT_WIDTH)

    def forward(self, pixels: torch.Tensor) -> networks.Text:
        """Return the state of one text token, zeros, and those of the image's tokens, and a pooled state of zeros.

        FluxPriorReduxPipeline gives FLUX_TEXT_TOKENS such text tokens.
        `pixels` has values from -1 to 1 and the shape (images, 3, PIXELS, PIXELS).
        """
        embedded = self.image_embedder(self.image_encoder(pixels).last_hidden_state).image_embeds
        no_text = embedded.new_zeros(len(pixels), 1, TEXT_WIDTH)
        return torch.cat([no_text, embedded], dim=1), embedded.new_zeros(len(pixels), TEXT_WIDTH)


def squash(picture: Image.Image) -> Image.Image:
    """Resize an image to the encoder's square, as its image processor does."""
    return picture.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)


class Examples:
    """Scenes as the image encoder sees them, and as the transformer should draw them: in one size."""

    def __init__(self, things: tuple[Object, ...], device: str, size: pool.Size) -> None:
        self._things, self._size, self._device = things, size, device
        self._icons = {thing.name: thing.icon for thing in things}
        self._vae = autoencoder.load(device)
        self._scaling, self._shift = pool.statistics()

    @torch.no_grad()
    def batch(self, number: int, rng: numpy.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pixels of random scenes, squashed, and their scaled latents."""
        found = [scenes.sample(self._things, rng) for _ in range(number)]
        pictures = [render.render(scene, self._icons, *self._size) for scene in found]
        latents = self._vae.encode(autoencoder.to_tensor(pictures).to(self._device), return_dict=False)[0]
        pixels = autoencoder.to_tensor([squash(picture) for picture in pictures]).to(self._device)
        return pixels, (latents - self._shift) * self._scaling


def train(plan: Plan, device: str) -> None:
    """Train the image encoder with the frozen transformer, without checkpoints. Do nothing if the result exists."""
    if FILE.is_file():
        return
    torch.manual_seed(SEED)
    painter = flow.best(plan)
    painter.to(device).requires_grad_(False)
    prior = Prior().to(device).train()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=0.0, weight_decay=0.01)
    examples = {size: Examples(all_objects(plan.scale), device, size) for size in set(SIZES)}
    losses: list[float] = []
    for iteration in range(plan.redux_iterations):
        rng, generator = numpy.random.default_rng([SEED, 12, iteration]), torch.Generator().manual_seed(iteration)
        size = SIZES[iteration % len(SIZES)]
        pixels, latents = examples[size].batch(BATCH if size == SIZES[0] else BATCH // 4, rng)
        for group in optimizer.param_groups:
            group["lr"] = autoencoder.rate(iteration, plan.redux_iterations, PEAK)
        with networks.first_token_counts(FLUX_TEXT_TOKENS):
            loss = flow.loss_of(painter, latents, lambda: prior(pixels), generator)  # noqa: B023  called at once
            loss.backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if iteration % 50 == 49:
            checkpoint.log(f"redux {iteration + 1} loss {sum(losses) / len(losses):.4f}")
            losses.clear()
    checkpoint.save(FILE, prior.state_dict())


def export(weights: Path) -> None:
    """Add FluxPriorReduxPipeline, in bf16, to the directory of a pipeline."""
    prior = Prior()
    prior.load_state_dict(checkpoint.load(FILE))
    for name in ("image_encoder", "image_embedder"):
        getattr(prior, name).to(torch.bfloat16).save_pretrained(weights / REDUX.directory / name)
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": PIXELS, "width": PIXELS},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    tokens.write_json(weights / REDUX.directory / "feature_extractor" / "preprocessor_config.json", processor)
    tokens.write_json(weights / REDUX.directory / "model_index.json", CLASSES)
