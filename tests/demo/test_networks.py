"""The networks of the recipe."""

import torch

from models.demo.recipe import networks
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
