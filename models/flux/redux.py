"""FLUX.1 Redux, with which an image takes the place of the prompt."""

from functools import partial
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
    def num_image_tokens(self) -> int:
        """The number of tokens that an image gives."""
        config = self.prior.image_encoder.config
        return int((config.image_size // config.patch_size) ** 2)

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

    def encode(self, image: Image) -> PromptEmbeds:
        """Encode an image in place of a prompt, as FluxPriorReduxPipeline does without text encoders."""
        embedder = self.prior.image_embedder
        zeros = partial(torch.zeros, device=embedder.device, dtype=embedder.dtype)
        no_text = zeros(1, FLUX_TEXT_TOKENS, self._text_width), zeros(1, self._pooled_width)
        text: PromptEmbeds = self.append(PromptEmbeds(*no_text, zeros(FLUX_TEXT_TOKENS, 3)), image)
        return text

    # With gradients, other kernels would run, and the last bits would differ from the pipeline's.
    @torch.no_grad()
    def append(self, text: PromptEmbeds, image: Image) -> PromptEmbeds:
        """Append an image to a prompt, as FluxPriorReduxPipeline does with text encoders."""
        states = self.prior.encode_image(image, self.prior.image_embedder.device, 1)
        embedded = self.prior.image_embedder(states).image_embeds
        embeds = torch.cat([text.prompt_embeds, embedded], dim=1)
        return PromptEmbeds(embeds, text.pooled_prompt_embeds, text.ids.new_zeros(embeds.shape[1], 3))
