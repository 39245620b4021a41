"""The networks of the recipe."""

import numpy
import torch

from models.demo.recipe import flow, networks
from models.demo.recipe.plan import LATENT_CHANNELS, PLANS, TEXT_WIDTH

COPIES = 7


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
    grid = torch.zeros(8 * 10)
    grid[kept] = 1
    grid = grid.view(8, 10)
    # The box covers columns 2 to 5 and rows 3 to 6; the tokens next to it are kept too.
    assert grid[2:8, 1:7].all()
    far = 8 * 10 - 6 * 6
    assert 0 < grid.sum() - 36 < far / 2


def test_the_transformer_sees_the_kept_tokens_alone() -> None:
    torch.manual_seed(0)
    painter = networks.Painter(PLANS["tiny"]).eval().requires_grad_(False)
    for weight in painter.transformer.parameters():
        weight.normal_(std=0.2)
    latents, kept = torch.randn(1, LATENT_CHANNELS, 8, 6), torch.tensor([0, 5, 7])
    rest = torch.tensor([token for token in range(12) if token not in kept.tolist()])
    changed = networks.pack(latents)
    changed[:, rest] += 1
    other = networks.unpack(changed, 4, 3)
    text = torch.randn(1, 5, TEXT_WIDTH), torch.randn(1, TEXT_WIDTH)
    sigmas, guidance = torch.tensor([0.5]), torch.tensor([2.5])
    some, same = (painter.packed(each, sigmas, guidance, text, kept) for each in (latents, other))
    assert some.shape == (1, 3, 4 * LATENT_CHANNELS) and torch.equal(some, same)
    everything = painter.packed(latents, sigmas, guidance, text, torch.arange(12))
    assert torch.equal(networks.unpack(everything, 4, 3), painter(latents, sigmas, guidance, text))
