"""A FLUX of a few thousand random weights, and how it is painted with, step by step."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL.Image import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from models.flux.acceleration import Tier
from models.flux.engine import FluxEngine
from models.flux.sharing import Sharing
from models.flux.task import FluxTask
from models.flux_dev import FluxDevInput
from models.loading.specs import DEMO

TEXT_WIDTH = 16
#: Of its pictures: 8 pixels a latent, 2 x 2 latents a token.
PIXELS_A_TOKEN = 256


class CallsAllSafe:
    """A safety checker that finds nothing."""

    def is_unsafe(self, pictures: Sequence[Image]) -> Sequence[bool]:
        return [False] * len(pictures)


def transformer(dtype: torch.dtype = torch.float32, **changes: Any) -> FluxTransformer2DModel:
    """FLUX's own kind, with small dimensions."""
    torch.manual_seed(7)
    settings = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": TEXT_WIDTH,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return FluxTransformer2DModel(**{**settings, **changes}).to(dtype).eval()


def autoencoder() -> AutoencoderKL:
    """FLUX's own kind, with small dimensions."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def pipeline(dtype: torch.dtype = torch.float32, *, guidance: bool = True, dynamic_shift: bool = True) -> FluxPipeline:
    """FluxPipeline as diffusers makes it; the same weights each time."""
    flow = transformer(guidance_embeds=guidance)
    words, more_words = (
        CLIPTokenizer.from_pretrained(DEMO / "tokenizer"),
        T5TokenizerFast.from_pretrained(DEMO / "tokenizer_2"),
    )
    clip = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    t5 = T5Config(vocab_size=len(more_words), d_model=TEXT_WIDTH, d_kv=8, d_ff=TEXT_WIDTH, num_layers=1, num_heads=2)
    made = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0 if dynamic_shift else 1.0, use_dynamic_shifting=dynamic_shift),
        autoencoder(),
        CLIPTextModel(clip),
        words,
        T5EncoderModel(t5),
        more_words,
        flow,
    ).to(dtype)
    for part in (made.vae, made.text_encoder, made.text_encoder_2):
        part.eval()
    made.set_progress_bar_config(disable=True)
    return made


def tiers_of(flow: Any) -> list[Tier]:
    """All three, on one transformer."""
    return [Tier("none", flow), Tier("regular", flow, shares_forwards=True), Tier("high", flow, skips_blocks=True)]


class SharesAlways(Sharing):
    """Every forward that can be shared is, whatever it costs."""

    def __init__(self) -> None:
        super().__init__(lambda: 0.0)

    def number(self, size: Hashable, wanted: int) -> int:
        return wanted


def engine(dtype: torch.dtype = torch.float32, **settings: Any) -> FluxEngine:
    """An engine with all three tiers, which shares every forward that can be shared."""
    parts = pipeline(dtype, **settings)
    return FluxEngine(parts, CallsAllSafe(), tiers_of(parts.transformer), "cpu", sharing=SharesAlways())


def asked(prompt: str = "a red apple", width: int = 64, height: int = 64, **more: Any) -> FluxDevInput:
    """A request of two steps, unless said otherwise."""
    size = {"width": width, "height": height}
    return FluxDevInput.model_validate({"prompt": prompt, "image_size": size, "num_inference_steps": 2, **more})


def stepped(engine: FluxEngine, painting: FluxTask) -> FluxTask:
    """The painting, after its last step."""
    while painting.step < painting.num_steps:
        engine.advance(painting)
    return painting


def finished(engine: FluxEngine, painting: FluxTask) -> list[Image]:
    """Its pictures, after all the steps that it lacks."""
    stepped(engine, painting)
    while not painting.is_decoded:
        engine.decode(painting)
    return painting.images


def latents_of(engine: FluxEngine, request: FluxDevInput, seed: int) -> torch.Tensor:
    """The latents of its one picture, painted alone."""
    (generation,) = stepped(engine, engine.start(request, seed)).samples
    latents: torch.Tensor = generation.latents
    return latents


def painted(engine: FluxEngine, request: FluxDevInput, seed: int) -> list[Image]:
    """Its pictures, painted alone."""
    return finished(engine, engine.start(request, seed))


def difference(one: Image, other: Image) -> int:
    """The greatest, of 255."""
    return int(numpy.abs(numpy.asarray(one, dtype=int) - numpy.asarray(other, dtype=int)).max())


@contextmanager
def batches(module: Any) -> Iterator[list[int]]:
    """How many generations went through each forward of this transformer."""
    seen: list[int] = []

    def look(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        seen.append(len(inputs["hidden_states"]))

    hook = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()
