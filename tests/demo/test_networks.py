"""The networks of the recipe."""

import numpy
import pytest
import torch
from diffusers.models.transformers import transformer_flux

from models.demo.recipe import flow, networks
from models.demo.recipe.plan import LATENT_CHANNELS, PLANS, TEXT_WIDTH

COPIES = 7


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> networks.Painter:
    """Build a tiny model with random weights; its tokenizers, which these tests do not need, are made by the recipe."""
    monkeypatch.setattr("models.demo.recipe.tokens.load", lambda: (range(20), range(20)))
    torch.manual_seed(0)
    built = networks.Painter(PLANS["tiny"])
    built.eval().requires_grad_(False)
    for weight in built.transformer.parameters():
        weight.normal_(std=0.2)
    return built


@pytest.fixture
def explicit_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the recipe's attention, and restore diffusers' own afterwards."""
    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", transformer_flux.dispatch_attention_fn)
    networks.use_explicit_attention()


def test_a_token_that_counts_as_many_gives_what_many_give() -> None:
    torch.manual_seed(0)
    transformer = networks.build_transformer(PLANS["tiny"]).eval().requires_grad_(False)
    for weight in transformer.parameters():
        weight.normal_(std=0.2)
    cells, others = torch.randn(1, 6, 4 * LATENT_CHANNELS), torch.randn(1, 3, TEXT_WIDTH)

    def velocity(num_zeros: int) -> torch.Tensor:
        states = torch.cat([torch.zeros(1, num_zeros, TEXT_WIDTH), others], dim=1)
        found: torch.Tensor = transformer(
            hidden_states=cells,
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([2.5]),
            pooled_projections=torch.zeros(1, TEXT_WIDTH),
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3),
            img_ids=networks.positions(2, 3),
            return_dict=False,
        )[0]
        return found

    with networks.first_token_counts(COPIES):
        found = velocity(1)
    assert torch.allclose(found, velocity(COPIES), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, velocity(1), rtol=1e-2, atol=1e-2)


def test_the_tokens_of_objects_and_few_others_are_trained_on() -> None:
    size, box = (320, 256), (64, 96, 128)
    kept = flow.kept_tokens(size, (box,), numpy.random.default_rng(0))
    grid, copies = torch.zeros(8 * 10), torch.zeros(8 * 10)
    grid[kept.indices], copies[kept.indices] = 1.0, kept.copies
    grid, copies = grid.view(8, 10), copies.view(8, 10)
    # The box covers columns 2 to 5 and rows 3 to 6; the tokens next to it are kept too.
    assert grid[2:8, 1:7].all()
    far = 8 * 10 - 6 * 6
    assert 0 < grid.sum() - 36 < far / 2
    assert (copies[2:8, 1:7] == 1).all() and copies.sum() == 8 * 10


def test_the_transformer_sees_the_kept_tokens_alone(painter: networks.Painter, explicit_attention: None) -> None:
    latents, tokens = torch.randn(1, LATENT_CHANNELS, 8, 6), [0, 5, 7]
    kept = networks.Kept(torch.tensor(tokens), torch.ones(3))
    rest = torch.tensor([token for token in range(12) if token not in tokens])
    changed = networks.pack(latents)
    changed[:, rest] += 1
    other = networks.unpack(changed, 4, 3)
    text = torch.randn(1, 5, TEXT_WIDTH), torch.randn(1, TEXT_WIDTH)
    sigmas, guidance = torch.tensor([0.5]), torch.tensor([2.5])
    some, same = (painter.packed(each, sigmas, guidance, text, kept) for each in (latents, other))
    assert some.shape == (1, 3, 4 * LATENT_CHANNELS) and torch.equal(some, same)
    whole = networks.Kept(torch.arange(12), torch.ones(12))
    everything = painter.packed(latents, sigmas, guidance, text, whole)
    assert torch.allclose(networks.unpack(everything, 4, 3), painter(latents, sigmas, guidance, text), atol=1e-4)


def test_a_kept_token_that_stands_for_several_counts_as_these(
    painter: networks.Painter, explicit_attention: None
) -> None:
    latents = torch.randn(1, LATENT_CHANNELS, 8, 6)
    text = torch.randn(1, 5, TEXT_WIDTH), torch.randn(1, TEXT_WIDTH)
    sigmas, guidance = torch.tensor([0.5]), torch.tensor([2.5])

    def first(indices: list[int], copies: list[float]) -> torch.Tensor:
        kept = networks.Kept(torch.tensor(indices), torch.tensor(copies))
        return painter.packed(latents, sigmas, guidance, text, kept)[:, 0]

    one, three = first([0, 7], [1, 3]), first([0, 7, 7, 7], [1, 1, 1, 1])
    assert torch.allclose(one, three, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(one, first([0, 7], [1, 1]), rtol=1e-2, atol=1e-2)
