"""FLUX.1 Redux: a picture takes the place of the prompt."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPriorReduxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL.Image import Image
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from models.flux.prompt_cache import NUM_TOKENS, PromptEmbeds
from models.loading import verify
from models.loading.hub import BadWeights


class Redux:
    """The prior of FLUX.1 Redux [dev]: what a picture shows, told to the transformer after a text of zeros."""

    def __init__(self, prior: FluxPriorReduxPipeline, transformer: Any) -> None:
        self.prior = prior
        self._text_width = transformer.config.joint_attention_dim
        self._pooled_width = transformer.config.pooled_projection_dim
        told = prior.image_embedder.config.txt_in_features
        if told != self._text_width:
            message = f"this Redux is for text states {told} wide, and the transformer reads {self._text_width}"
            raise BadWeights(f"{message}; take the Redux weights that were made for it")

    @property
    def num_tokens(self) -> int:
        """How many tokens a picture becomes, after those of the text."""
        config = self.prior.image_encoder.config
        return int((config.image_size // config.patch_size) ** 2)

    @classmethod
    def load(cls, directory: Path, transformer: Any, device: str) -> "Redux":
        """In the transformer's type, on the device; only safetensors. Raises OSError, also where it does not fit."""
        verify.verify(directory)
        dtype = transformer.dtype
        with verify.translate_errors(directory):
            prior = FluxPriorReduxPipeline(
                image_encoder=verify.load_complete(
                    SiglipVisionModel, directory / "image_encoder", dtype=dtype, trust_remote_code=False
                ),
                # Pillow's way of scaling is the same everywhere, and needs no torchvision.
                feature_extractor=SiglipImageProcessorPil.from_pretrained(
                    directory / "feature_extractor", local_files_only=True, trust_remote_code=False
                ),
                image_embedder=verify.load_complete(ReduxImageEncoder, directory / "image_embedder", dtype=dtype),
            )
            return cls(prior.to(device), transformer)

    # With gradients other kernels would run, and the last bits differ from the pipeline's.
    @torch.no_grad()
    def encode(self, image: Image) -> PromptEmbeds:
        """What stands for the text, as FluxPriorReduxPipeline makes it when it has no text encoders."""
        device = self.prior.image_embedder.device
        states = self.prior.encode_image(image, device, 1)
        told = self.prior.image_embedder(states).image_embeds
        no_text = told.new_zeros(1, NUM_TOKENS, self._text_width)
        embeds = torch.cat([no_text, told], dim=1)
        ids = told.new_zeros(embeds.shape[1], 3)
        return PromptEmbeds(embeds, told.new_zeros(1, self._pooled_width), ids)
