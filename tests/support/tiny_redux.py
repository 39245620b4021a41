"""Small random Redux weights, the same each time."""

from pathlib import Path

import torch
from diffusers import FluxPriorReduxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel


def prior(dtype: torch.dtype, width: int) -> FluxPriorReduxPipeline:
    """Build diffusers' own pipeline with a small image encoder: 16 patches an image, the same weights each time."""
    torch.manual_seed(11)
    vision_config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    return FluxPriorReduxPipeline(
        image_encoder=SiglipVisionModel(vision_config).eval(),
        feature_extractor=SiglipImageProcessorPil(size={"height": 56, "width": 56}),
        image_embedder=ReduxImageEncoder(redux_dim=32, txt_in_features=width).eval(),
    ).to(dtype)


def write_redux(weights: Path, width: int) -> None:
    """Add Redux weights to the directory of a pipeline, as `save_pretrained` writes them."""
    prior(torch.bfloat16, width).save_pretrained(weights / "redux")
