"""The training by flow matching: at every time between image and noise, the model learns the velocity towards noise."""

import json
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import _dynamo as dynamo

from models.demo.recipe import (
    autoencoder,
    captions,
    checkpoint,
    flow_times,
    networks,
    precision,
    preview,
    published,
    reading,
    threads,
)
from models.demo.recipe.autoencoder import rate
from models.demo.recipe.optimizers import Optimizers
from models.demo.recipe.plan import EARLY, SEED, TEXT_TOKENS, TOKEN_PIXELS, WORK, Plan
from models.demo.recipe.pool import Pool, Size, pick_size
from models.demo.recipe.scenes import Box

FILE, BEST = WORK / "flow.pt", WORK / "best.pt"
#: The number of iterations from one chunk of new scenes to the next, until the pool is full.
ITERATIONS_A_CHUNK = 60
#: The share of the iterations whose images lack most of their background, until the last tenth, which has none.
CROPPED, LAST_CROPPED = 0.4, 0.9
#: The share of whole images that have the early mix of sizes after the early part too. More small images fit in one
#: iteration.
SMALL_SHARE = 0.5
#: The share of the tokens far from objects that such an image keeps.
KEPT_BACKGROUND = 0.15
#: The decay of the average weights per iteration.
EMA = 0.9995
#: The learning rate of the text encoders, which are trained already, as a share of the transformer's.
READING_SHARE = 0.1


class Trainer:
    """The model, its optimizer and average weights, and the pool of scenes."""

    def __init__(self, plan: Plan, device: str) -> None:
        self.plan, self.device = plan, device
        self.pool = Pool(plan, autoencoder.load(device), device)
        while self.pool.num_chunks < plan.min_chunks or self.pool.missing:
            self.pool.grow()
        self.scaling, self.shift = self.pool.statistics()
        self.things = {thing.name: thing for thing in self.pool.things}
        networks.use_explicit_attention()
        torch.manual_seed(SEED)
        self.painter = networks.Painter(plan)
        if not plan.is_from_scratch:
            published.load_into(self.painter.transformer, "transformer")
        reading.load_into(self.painter)
        self.painter.to(device)
        if plan.is_compiled:
            # Blocks are compiled for any size and number of images, in two minutes; one size at a time, it took ten.
            # They are compiled again for each number of threads, which may exceed the default limit.
            dynamo.config.recompile_limit = 64
            self.painter.transformer.compile_repeated_blocks(dynamic=True)
        self.optimizer = self._optimizer()
        self.average = {name: weight.detach().clone() for name, weight in self.painter.named_parameters()}
        self.iteration, self.best = published.iterations(plan, "flow"), 0.0
        self._resume()

    @property
    def is_early(self) -> bool:
        """Whether training is in its early part, in which most images are small."""
        return self.iteration < EARLY * self.plan.flow_iterations

    def _optimizer(self) -> Optimizers:
        """Return an optimizer. The matrices of the transformer's blocks count as hidden, except the modulations."""
        hidden: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, weight in self.painter.transformer.named_parameters():
            is_hidden = "transformer_blocks." in name and ".norm" not in name and weight.ndim == 2
            (hidden if is_hidden else others).append(weight)
        readers = [*self.painter.text_encoder.parameters(), *self.painter.text_encoder_2.parameters()]
        return Optimizers(hidden, [{"params": others}, {"params": readers, "share": READING_SHARE}], self.device)

    def _resume(self) -> None:
        saved = checkpoint.load(FILE)
        if saved is None:
            return
        self.painter.load_state_dict(saved["painter"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average = {name: weight.to(self.device) for name, weight in saved["average"].items()}
        self.iteration, self.best = saved["iteration"], saved["best"]

    def save(self) -> None:
        """Write a checkpoint, from which the same command continues."""
        state = {"painter": self.painter.state_dict(), "optimizer": self.optimizer.state_dict()}
        checkpoint.save(FILE, {**state, "average": self.average, "iteration": self.iteration, "best": self.best})

    def batch(self, rng: numpy.random.Generator) -> tuple[torch.Tensor, list[str], networks.Kept | None]:
        """Return scaled latents of one size, a caption for each, and the tokens to train on; None for all tokens."""
        is_cropped = self.iteration < LAST_CROPPED * self.plan.flow_iterations and rng.random() < CROPPED
        size = pick_size(rng, self.is_early or (not is_cropped and rng.random() < SMALL_SHARE))
        boxes, kept = None, None
        if is_cropped:
            boxes = self.pool.pick_boxes(size, rng)
            kept = kept_tokens(size, boxes, rng)
        num_tokens = flow_times.tokens_of(size) if kept is None else len(kept.indices)
        number = max(1, self.plan.batch_tokens // (num_tokens + TEXT_TOKENS))
        found, latents = self.pool.pick(size, boxes, number, rng)
        texts = [captions.caption(scene, self.things, rng) for scene in found]
        return ((latents - self.shift) * self.scaling).to(self.device), texts, kept

    def step(self) -> float:
        """Run one iteration; return the loss."""
        rng = numpy.random.default_rng([SEED, 2, self.iteration])
        generator = torch.Generator().manual_seed(SEED + self.iteration)
        latents, texts, kept = self.batch(rng)
        loss = loss_of(self.painter, latents, lambda: self.painter.encode(texts), generator, kept)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.painter.parameters(), 1.0)
        self.optimizer.step(rate(self.iteration, self.plan.flow_iterations, self.plan.learning_rate, warm_up=500))
        self.iteration += 1
        self._follow()
        return float(loss.detach())

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average weights towards the current ones, faster at the beginning."""
        decay = min(EMA, (1 + self.iteration) / (10 + self.iteration))
        weights = [weight for _, weight in self.painter.named_parameters()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    def averaged(self) -> Any:
        """Return a model with the average weights."""
        painter = networks.Painter(self.plan).to(self.device).eval().requires_grad_(False)
        painter.load_state_dict({**self.painter.state_dict(), **self.average})
        return painter

    def show(self) -> None:
        """Write a contact sheet, score the average weights, and keep them if no earlier ones scored higher."""
        painter = self.averaged()
        preview.sheet(painter, self.pool, self.iteration)
        score = preview.score(painter, self.pool)
        checkpoint.log(f"flow {self.iteration} score {json.dumps(score)}")
        worth = sum(score.values()) / max(1, len(score))
        if worth >= self.best:
            self.best = worth
            checkpoint.save(BEST, {"average": self.average, "iteration": self.iteration, "score": score})


def kept_tokens(size: Size, boxes: tuple[Box, ...], rng: numpy.random.Generator) -> networks.Kept:
    """Return the image tokens to train on: those in and next to the boxes, and a random few others.

    Most tokens show nothing but background, which is learnt early. Without them, an iteration takes in more images.
    Each of the few stands for several, so that attention sees as much background as in a whole image.
    """
    width, height = (side // TOKEN_PIXELS for side in size)
    is_near = numpy.zeros((height, width), bool)
    for box in boxes:
        left, top, side = (each // TOKEN_PIXELS for each in box)
        is_near[max(0, top - 1) : top + side + 1, max(0, left - 1) : left + side + 1] = True
    is_kept = is_near | (rng.random((height, width)) < KEPT_BACKGROUND)
    num_far, num_kept = (~is_near).sum(), (is_kept & ~is_near).sum()
    copies = numpy.where(is_near, 1.0, num_far / max(1, num_kept))
    return networks.Kept(
        torch.from_numpy(numpy.flatnonzero(is_kept)), torch.from_numpy(copies[is_kept].astype(numpy.float32))
    )


def loss_of(
    painter: networks.Painter,
    latents: torch.Tensor,
    encode: Callable[[], networks.Text],
    generator: torch.Generator,
    kept: networks.Kept | None = None,
    channels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mean squared error of the velocity, for scaled latents of one size at random times.

    `encode` returns what the transformer reads for each of them. It is called where matrix products are in the fast
    number type. The transformer sees the image tokens in `kept`, or all, and their `channels`.
    """
    device = latents.device
    noise = torch.randn(latents.shape, generator=generator).to(device)
    num_tokens = latents.shape[2] * latents.shape[3] // 4
    # Large images with channels are always cropped, so they must be trained at late times too. There, the channels say
    # what to draw, not the noisy tokens.
    is_cropped = kept is not None and channels is None
    sigmas = flow_times.sample(len(latents), num_tokens, generator, is_cropped=is_cropped).to(device)
    # Draw any guidance scale, so that the model learns to ignore the one in a request, which is at most 35.
    guidance = (1 + 34 * torch.rand(len(latents), generator=generator)).to(device)
    mixed = torch.lerp(latents, noise, sigmas[:, None, None, None])
    with precision.mixed(device.type):
        velocity = painter.packed(mixed, sigmas, guidance, encode(), kept, channels)
    wanted = networks.pack(noise - latents)
    return (velocity - (wanted if kept is None else wanted[:, kept.indices.to(device)])).square().mean()


def best(plan: Plan) -> networks.Painter:
    """Return the model with the best-scored weights, or the latest if there is no score.

    Raises FileNotFoundError if nothing is trained.
    """
    saved = checkpoint.load(BEST) or checkpoint.load(FILE)
    if saved is None:
        raise FileNotFoundError(FILE)
    painter = networks.Painter(plan)
    painter.load_state_dict(saved["average"], strict=False)
    checkpoint.log(f"weights of iteration {saved['iteration']}")
    return painter


def train(plan: Plan, device: str) -> None:
    """Train the model, from the last checkpoint if there is one. Do nothing if the training is complete."""
    trainer = Trainer(plan, device)
    to_save = checkpoint.Timer(plan.minutes_between_checkpoints)
    to_show = checkpoint.Timer(plan.minutes_between_sheets)
    losses: list[float] = []
    first = trainer.iteration
    if first >= plan.flow_iterations:
        if not FILE.is_file():
            trainer.save()
        return
    while trainer.iteration < plan.flow_iterations:
        if trainer.iteration % ITERATIONS_A_CHUNK == 0 and not trainer.pool.is_full:
            trainer.pool.grow()
        losses.append(trainer.step())
        if trainer.iteration % 50 == 0:
            checkpoint.log(
                f"flow {trainer.iteration} loss {sum(losses) / len(losses):.4f} pool {trainer.pool.num_chunks}"
            )
            losses.clear()
            threads.fit(plan)
        if to_save.is_due():
            trainer.save()
        if to_show.is_due() or trainer.iteration == first + 200:
            trainer.show()
    trainer.save()
    trainer.show()
