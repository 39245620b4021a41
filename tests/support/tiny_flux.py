"""A FLUX pipeline with small dimensions and random weights, its LoRAs, and functions that run it step by step."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL.Image import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from models.flux.acceleration import Tier
from models.flux.engine import FluxEngine
from models.flux.sharing import Sharing
from models.flux.task import FluxTask
from models.flux_dev import FluxDevInput
from models.loading.specs import DEMO

TEXT_WIDTH = 16
#: Pixels for each image token: a latent covers 8 x 8 pixels, a token 2 x 2 latents.
PIXELS_A_TOKEN = 256
#: The rank of LoRA weights.
RANK = 4


class AllSafeChecker:
    """A safety checker that flags no image."""

    def is_unsafe(self, images: Sequence[Image]) -> Sequence[bool]:
        return [False] * len(images)


def transformer(dtype: torch.dtype = torch.float32, **changes: Any) -> FluxTransformer2DModel:
    """Build FLUX's transformer with small dimensions; the weights are the same each time."""
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
    """Build FLUX's autoencoder with small dimensions and random weights."""
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
    """Build diffusers' FluxPipeline with small dimensions; the weights are the same each time."""
    flow_transformer = transformer(guidance_embeds=guidance)
    clip_tokenizer, t5_tokenizer = (
        CLIPTokenizer.from_pretrained(DEMO / "tokenizer"),
        T5TokenizerFast.from_pretrained(DEMO / "tokenizer_2"),
    )
    clip_config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5_tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=TEXT_WIDTH, num_layers=1, num_heads=2
    )
    built = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0 if dynamic_shift else 1.0, use_dynamic_shifting=dynamic_shift),
        autoencoder(),
        CLIPTextModel(clip_config),
        clip_tokenizer,
        T5EncoderModel(t5_config),
        t5_tokenizer,
        flow_transformer,
    ).to(dtype)
    for component in (built.vae, built.text_encoder, built.text_encoder_2):
        component.eval()
    built.set_progress_bar_config(disable=True)
    return built


def tiers_of(flow_transformer: Any) -> list[Tier]:
    """Build all three tiers on one transformer."""
    return [
        Tier("none", flow_transformer),
        Tier("regular", flow_transformer, shares_forwards=True),
        Tier("high", flow_transformer, skips_blocks=True),
    ]


class AlwaysShare(Sharing):
    """A sharing policy by which images share forwards whenever they can, whatever the cost."""

    def __init__(self) -> None:
        super().__init__(lambda: 0.0)

    def number(self, size: Hashable, wanted: int) -> int:
        return wanted


def engine(dtype: torch.dtype = torch.float32, **settings: Any) -> FluxEngine:
    """Build an engine with all three tiers, in which images share forwards whenever they can."""
    tiny_pipeline = pipeline(dtype, **settings)
    return FluxEngine(
        tiny_pipeline, AllSafeChecker(), tiers_of(tiny_pipeline.transformer), "cpu", sharing=AlwaysShare()
    )


def make_request(prompt: str = "a red apple", width: int = 64, height: int = 64, **more: Any) -> FluxDevInput:
    """Build a request; it has two steps unless `more` says otherwise."""
    size = {"width": width, "height": height}
    return FluxDevInput.model_validate({"prompt": prompt, "image_size": size, "num_inference_steps": 2, **more})


def run_steps(engine: FluxEngine, task: FluxTask) -> FluxTask:
    """Take all remaining steps of the task; return the task."""
    while task.step < task.num_steps:
        engine.advance(task)
    return task


def finish_task(engine: FluxEngine, task: FluxTask) -> list[Image]:
    """Take all remaining steps of the task, decode it, and return its images."""
    run_steps(engine, task)
    while not task.is_decoded:
        engine.decode(task)
    return task.images


def generate_latents(engine: FluxEngine, request: FluxDevInput, seed: int) -> torch.Tensor:
    """Run the request alone; return the latents of its only image."""
    (sample,) = run_steps(engine, engine.start(request, seed)).samples
    latents: torch.Tensor = sample.latents
    return latents


def generate(engine: FluxEngine, request: FluxDevInput, seed: int) -> list[Image]:
    """Run the request alone; return its images."""
    return finish_task(engine, engine.start(request, seed))


def difference(one: Image, other: Image) -> int:
    """Return the greatest difference between two pixel values, 0 to 255."""
    return int(numpy.abs(numpy.asarray(one, dtype=int) - numpy.asarray(other, dtype=int)).max())


@contextmanager
def record_batch_sizes(module: Any) -> Iterator[list[int]]:
    """Yield a list of batch sizes. Until the block ends, each forward of this transformer appends its size."""
    sizes: list[int] = []

    def record(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        sizes.append(len(inputs["hidden_states"]))

    hook = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield sizes
    finally:
        hook.remove()


def write_lora(
    path: Path, seed: int, *, text: bool = False, rank: int = RANK, width: int = 32, inner: int = 16
) -> Path:
    """Write LoRA weights for some layers of `tiny_flux`, under diffusers' own names; return the path."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        "transformer.transformer_blocks.0.attn.to_q": (width, width),
        "transformer.transformer_blocks.0.ff.net.0.proj": (width, 4 * width),
        "transformer.single_transformer_blocks.1.proj_mlp": (width, 4 * width),
        "transformer.x_embedder": (inner, width),
    }
    if text:
        layers["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"] = (16, 16)
    weights = {}
    for name, (taken, given) in layers.items():
        weights[f"{name}.lora_A.weight"] = 0.3 * torch.randn(rank, taken, generator=generator)
        weights[f"{name}.lora_B.weight"] = 0.3 * torch.randn(given, rank, generator=generator)
    save_file(weights, path)
    return path
