"""FLUX.1 Redux, with which an image takes the place of the prompt."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPriorReduxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL.Image import Image
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from models.flux.prompt_cache import FLUX_TEXT_TOKENS, PromptEmbeds
from models.loading import verify
from models.loading.hub import BadWeights


class Redux:
    """The FLUX.1 Redux [dev] model, which turns an image into tokens for the transformer.

    In the transformer's input, these tokens follow the text tokens, which are all zeros.
    """

    def __init__(self, prior: FluxPriorReduxPipeline, transformer: Any) -> None:
        self.prior = prior
        self._text_width = transformer.config.joint_attention_dim
        self._pooled_width = transformer.config.pooled_projection_dim
        width = prior.image_embedder.config.txt_in_features
        if width != self._text_width:
            message = (
                f"the Redux weights make tokens of width {width}, but the transformer takes width {self._text_width}"
            )
            raise BadWeights(f"{message}; use the Redux weights for this transformer")

    @property
    def num_tokens(self) -> int:
        """The number of tokens in place of a prompt's tokens: the text tokens, all zeros, and the image's tokens."""
        config = self.prior.image_encoder.config
        return FLUX_TEXT_TOKENS + int((config.image_size // config.patch_size) ** 2)

    @classmethod
    def load(cls, directory: Path, transformer: Any, device: str) -> "Redux":
        """Load the weights onto the device, in the transformer's number type.

        Raises OSError if the weights cannot be loaded: BadWeights if they are malformed or for another transformer.
        """
        verify.verify(directory)
        dtype = transformer.dtype
        with verify.translate_errors(directory):
            prior = FluxPriorReduxPipeline(
                image_encoder=verify.load_complete(
                    SiglipVisionModel, directory / "image_encoder", dtype=dtype, trust_remote_code=False
                ),
                # The Pillow variant scales images identically everywhere and does not need torchvision.
                feature_extractor=SiglipImageProcessorPil.from_pretrained(
                    directory / "feature_extractor", local_files_only=True, trust_remote_code=False
                ),
                image_embedder=verify.load_complete(ReduxImageEncoder, directory / "image_embedder", dtype=dtype),
            )
            return cls(prior.to(device), transformer)

    # With gradients, other kernels would run, and the last bits would differ from the pipeline's.
    @torch.no_grad()
    def encode(self, image: Image) -> PromptEmbeds:
        """Encode an image in place of a prompt, as FluxPriorReduxPipeline does without text encoders."""
        device = self.prior.image_embedder.device
        states = self.prior.encode_image(image, device, 1)
        embedded = self.prior.image_embedder(states).image_embeds
        no_text = embedded.new_zeros(1, FLUX_TEXT_TOKENS, self._text_width)
        embeds = torch.cat([no_text, embedded], dim=1)
        ids = embedded.new_zeros(embeds.shape[1], 3)
        return PromptEmbeds(embeds, embedded.new_zeros(1, self._pooled_width), ids)
