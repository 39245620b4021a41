"""The work of a step in floating point operations, calculated from the sizes of the image and the transformer.

The scheduler charges this work to requests, and benchmarks divide it by the time that a step takes.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

#: Settings of FLUX.1 [dev]'s transformer, from its configuration file.
FLUX_DEV: Mapping[str, Any] = MappingProxyType(
    {
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    }
)


def step_flops(config: Mapping[str, Any], num_tokens: int, num_text_tokens: int) -> int:
    """Return the floating point operations of one forward of a FluxTransformer2DModel for one image.

    A multiplication and its addition count as two. Only matrix products and attention count; all else is a few
    thousandths of the work. `num_tokens` counts image tokens, which are width x height / 256 for FLUX.1.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    num_double, num_single = config["num_layers"], config["num_single_layers"]
    num_all = num_tokens + num_text_tokens
    out_channels = config["out_channels"] or config["in_channels"]
    # Each block of either kind has matrices for query, key, value and output, with 4 * width**2 weights together, and a
    # feed-forward of four times the width, with 8 * width**2 weights in its two matrices.
    linear = 12 * width**2 * num_all * (num_double + num_single)
    attention = 2 * num_all**2 * width * (num_double + num_single)
    ends = width * (
        (config["in_channels"] + out_channels) * num_tokens + config["joint_attention_dim"] * num_text_tokens
    )
    # The matrices for shift, scale and gate of the norms, used once per image: 12 in each double block, 3 in each
    # single block, 2 at the end.
    modulation = width**2 * (12 * num_double + 3 * num_single + 2)
    num_scalars = 2 if config["guidance_embeds"] else 1
    # Timestep and guidance are embedded from 256 sinusoids each.
    embedding = num_scalars * (256 * width + width**2) + config["pooled_projection_dim"] * width + width**2
    return int(2 * (linear + attention + ends + modulation + embedding))
