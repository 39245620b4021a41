"""The training of the two text encoders on captions, before the flow. FLUX.1's text encoders were trained first too."""

from typing import Any

import numpy
import torch
from torch.nn import functional

from models.demo.recipe import captions, checkpoint, networks, precision, published, scenes, threads, tokens
from models.demo.recipe.autoencoder import rate
from models.demo.recipe.objects import BACKGROUNDS, Object, all_objects
from models.demo.recipe.plan import SEED, TEXT_WIDTH, WORK, Plan

FILE = WORK / "reading.pt"
#: The number of captions per iteration, and the highest learning rate.
BATCH, PEAK = 128, 1.5e-3
_PLACES, _SIZES = (*scenes.PLACES, ""), ("", *captions.SIZES)


def _answers(scene: scenes.Scene, labels: dict[str, int]) -> list[int]:
    """Return the labels of background, first object, second object, place, size and gradient of a scene."""
    first, second = labels[scene.objects[0]], labels[scene.objects[1]] if len(scene.objects) == 2 else len(labels)
    background = list(BACKGROUNDS).index(scene.background)
    place, size = _PLACES.index(scene.place), _SIZES.index(scene.size)
    return [background, first, second, place, size, int(scene.is_gradient)]


def _num_answers(things: tuple[Object, ...]) -> list[int]:
    return [len(BACKGROUNDS), len(things), len(things) + 1, len(_PLACES), len(_SIZES), 2]


class Reader(torch.nn.Module):  # type: ignore[misc]
    """The two encoders, each with a linear classifier: CLIP's takes its pooled state, T5's the mean over the words."""

    def __init__(self, things: tuple[Object, ...]) -> None:
        super().__init__()
        self.tokenizer, self.tokenizer_2 = tokens.load()
        self.text_encoder = networks.build_text_encoder(len(self.tokenizer))
        self.text_encoder_2 = networks.build_text_encoder_2(len(self.tokenizer_2))
        self.num_answers = _num_answers(things)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(TEXT_WIDTH, sum(self.num_answers)) for _ in range(2))

    def forward(self, texts: list[str]) -> list[tuple[torch.Tensor, ...]]:
        """Return the logits, by encoder and then by label of `_answers`."""
        device = self.text_encoder.device
        clip = self.tokenizer(
            texts, padding=True, truncation=True, max_length=networks.CLIP_TOKENS, return_tensors="pt"
        )
        pooled = self.text_encoder(clip.input_ids.to(device)).pooler_output
        t5 = networks.t5_tokens(self.tokenizer_2, texts)
        states = self.text_encoder_2(t5.to(device)).last_hidden_state
        is_word = (t5 != 0).to(device)[..., None]
        mean = (states * is_word).sum(dim=1) / is_word.sum(dim=1)
        return [
            head(state).split(self.num_answers, dim=-1) for head, state in zip(self.heads, (pooled, mean), strict=True)
        ]


def _mark(given: list[tuple[torch.Tensor, ...]], wanted: torch.Tensor) -> tuple[torch.Tensor, list[list[float]]]:
    """Return the loss of the logits of `Reader`, and the shares of right labels, by encoder and then by label."""
    pairs = [list(zip(logits, wanted, strict=True)) for logits in given]
    loss = torch.stack([functional.cross_entropy(*pair) for of_encoder in pairs for pair in of_encoder]).sum()
    return loss, [[float((a.argmax(1) == b).float().mean()) for a, b in of_encoder] for of_encoder in pairs]


def _resume(plan: Plan, reader: Reader, optimizer: torch.optim.Optimizer) -> tuple[Any, int]:
    """Load the last checkpoint, else the weights in the repository; return the checkpoint and the iterations done."""
    saved: Any = checkpoint.load(FILE)
    if saved:
        reader.load_state_dict(saved["reader"])
        optimizer.load_state_dict(saved["optimizer"])
        return saved, saved["iteration"]
    if plan.is_from_scratch:
        return None, 0
    published.load_into(reader.text_encoder, "text_encoder", reader.tokenizer)
    published.load_into(reader.text_encoder_2, "text_encoder_2", reader.tokenizer_2)
    return None, published.iterations(plan, "reading")


def train(plan: Plan, device: str) -> None:
    """Train the text encoders, from the last checkpoint if there is one. Do nothing if the training is complete."""
    things = all_objects(plan.scale)
    tokens.write(things)
    labels, by_name = {thing.name: n for n, thing in enumerate(things)}, {thing.name: thing for thing in things}
    torch.manual_seed(SEED)
    reader = Reader(things).to(device)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
    saved, start = _resume(plan, reader, optimizer)
    if plan.is_compiled:
        # Most of the time goes into many small operations, which compilation joins.
        reader.text_encoder_2.compile(dynamic=False)
    timer, right = checkpoint.Timer(plan.minutes_between_checkpoints), []

    def keep(iteration: int) -> None:
        state = {"reader": reader.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration}
        checkpoint.save(FILE, state)

    for iteration in range(start, plan.reading_iterations):
        rng = numpy.random.default_rng([SEED, 9, iteration])
        found = [scenes.sample(things, rng) for _ in range(BATCH)]
        wanted = torch.tensor([_answers(scene, labels) for scene in found]).T.to(device)
        for group in optimizer.param_groups:
            group["lr"] = rate(iteration, plan.reading_iterations, PEAK)
        with precision.mixed(device):
            given = reader([captions.caption(scene, by_name, rng) for scene in found])
        loss, shares_right = _mark(given, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        right.append(shares_right)
        if iteration % 100 == 99:
            shares = numpy.array(right[-100:]).mean(axis=0).round(3).tolist()
            checkpoint.log(f"reading {iteration + 1} right {shares}")
            threads.fit(plan)
        if timer.is_due():
            keep(iteration + 1)
    if saved is None or start < plan.reading_iterations:
        keep(plan.reading_iterations)


def load_into(painter: networks.Painter) -> None:
    """Load the trained text encoders into a model."""
    learnt: dict[str, torch.Tensor] = checkpoint.load(FILE)["reader"]
    for name in ("text_encoder", "text_encoder_2"):
        part = {key.removeprefix(f"{name}."): weight for key, weight in learnt.items() if key.startswith(f"{name}.")}
        getattr(painter, name).load_state_dict(part)
