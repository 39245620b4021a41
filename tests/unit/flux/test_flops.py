"""Tests of the formula for the FLOPs of a step, against PyTorch's count and the published figures."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.flux.flops import FLUX_DEV, step_flops
from tests.support.tiny_flux import transformer


@pytest.mark.parametrize(("num_tokens", "num_text_tokens"), [(1, 1), (24, 7), (40, 96)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_embeds": False},
        {"num_layers": 3, "num_single_layers": 1},
        {"num_layers": 1, "num_single_layers": 0},
        {"in_channels": 24, "out_channels": 8},
        {"num_attention_heads": 3, "joint_attention_dim": 20, "pooled_projection_dim": 12},
    ],
)
def test_the_formula_equals_the_counter(changes: dict[str, Any], num_tokens: int, num_text_tokens: int) -> None:
    model = transformer(**changes)
    config = model.config
    inputs = {
        "hidden_states": torch.zeros(1, num_tokens, config.in_channels),
        "encoder_hidden_states": torch.zeros(1, num_text_tokens, config.joint_attention_dim),
        "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
        "timestep": torch.zeros(1),
        "guidance": torch.zeros(1) if config.guidance_embeds else None,
        "img_ids": torch.zeros(num_tokens, 3),
        "txt_ids": torch.zeros(num_text_tokens, 3),
    }
    # The counter does not count the CPU's attention kernel, so the math kernel runs.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert step_flops(config, num_tokens, num_text_tokens) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("width", "height", "tflop"), [(512, 512, 21.50), (1024, 768, 55.29), (768, 1024, 55.29), (1024, 1024, 74.39)]
)
def test_flux_dev_equals_the_published_figures(width: int, height: int, tflop: float) -> None:
    assert step_flops(FLUX_DEV, width * height // 256, 512) / 1e12 == pytest.approx(tflop, abs=0.02)
