"""Small random weights of many kinds: Fill, Canny, Depth, control LoRAs, control nets, and what reads images."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, FluxControlNetModel, FluxTransformer2DModel
from safetensors.torch import load_file, save, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessorPil,
)

from models import discover
from models.loading.specs import CLIP_VISION, DEMO

WEIGHTS = "diffusion_pytorch_model.safetensors"


def weights_of_every_endpoint(directory: Path) -> list[str]:
    """Return the WEIGHTS arguments for all endpoints: the demo, and for `flux-general` a copy that reads images.

    The copy is written to a new directory.
    """
    shutil.copytree(DEMO, directory / "general", ignore=shutil.ignore_patterns("recipe", "__pycache__"))
    write_clip_vision(directory / "general" / CLIP_VISION.directory)
    general = [endpoint for endpoint in discover() if endpoint.startswith("fal-ai/flux-general")]
    return ["demo", *(f"{endpoint}={directory / 'general'}" for endpoint in general)]


def write_demo_of_kind(directory: Path, kind: str) -> Path:
    """Copy the demo weights to a new directory, and make their transformer one of this kind; return the directory.

    It has the demo's weights, and random ones for the channels that are new.
    """
    shutil.copytree(DEMO, directory, ignore=shutil.ignore_patterns("recipe", "__pycache__"))
    vae = AutoencoderTiny.load_config(directory / "vae")
    latents, pixels = 4 * vae["latent_channels"], 2 ** len(vae["encoder_block_out_channels"][1:])
    _widen(directory / "transformer", 2 * latents + (4 * pixels**2 if kind == "fill" else 0))
    return directory


def control_lora_for(directory: Path, seed: int) -> bytes:
    """Return a file with a random control LoRA for the weights in a directory."""
    config = json.loads((directory / "transformer" / "config.json").read_text(encoding="utf-8"))
    return save(
        control_lora(seed, config["in_channels"], (config["num_attention_heads"], config["attention_head_dim"]))
    )


def write_control_lora(path: Path, seed: int, in_channels: int, heads: tuple[int, int]) -> None:
    """Write the control LoRA that `control_lora` makes."""
    save_file(control_lora(seed, in_channels, heads), path)


def control_lora(seed: int, in_channels: int, heads: tuple[int, int], rank: int = 4) -> dict[str, torch.Tensor]:
    """Make a random control LoRA for a transformer with this number of heads of this width.

    As the published ones, it takes two sets of latents, has biases, and replaces the weights of normalizations.
    """
    width = heads[0] * heads[1]
    generator = torch.Generator().manual_seed(seed)
    layers = {"x_embedder": 2 * in_channels, "transformer_blocks.0.attn.to_q": width}
    tensors = {}
    for layer, num_inputs in layers.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = 0.1 * torch.randn(rank, num_inputs, generator=generator)
        tensors[f"transformer.{layer}.lora_B.weight"] = 0.1 * torch.randn(width, rank, generator=generator)
        tensors[f"transformer.{layer}.lora_B.bias"] = 0.1 * torch.randn(width, generator=generator)
    tensors["transformer.transformer_blocks.0.attn.norm_q.weight"] = torch.randn(heads[1], generator=generator)
    return tensors


def _widen(transformer: Path, in_channels: int) -> None:
    config = json.loads((transformer / "config.json").read_text(encoding="utf-8"))
    weights = load_file(transformer / WEIGHTS)
    embedder = weights["x_embedder.weight"]
    torch.manual_seed(5)
    new = 0.02 * torch.randn(len(embedder), in_channels - config["in_channels"], dtype=embedder.dtype)
    weights["x_embedder.weight"] = torch.cat([embedder, new], dim=1)
    save_file(weights, transformer / WEIGHTS, {"format": "pt"})
    config |= {"in_channels": in_channels, "out_channels": config["in_channels"]}
    (transformer / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_depth(directory: Path) -> None:
    """Write a small Depth Anything model with random weights, and its image processor, to a new directory."""
    torch.manual_seed(3)
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(directory)
    processor = DPTImageProcessorPil(
        size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14, do_resize=True
    )
    processor.save_pretrained(directory)


def control_net_for(directory: Path, seed: int, **changes: Any) -> bytes:
    """Return a file with a random control net for the weights in a directory."""
    transformer = FluxTransformer2DModel.from_pretrained(directory / "transformer")
    return save(control_net(seed, transformer, **changes).state_dict())


def control_net(seed: int, transformer: Any, **changes: Any) -> FluxControlNetModel:
    """Make a control net with random weights for a transformer, with one block of either kind and no guidance."""
    torch.manual_seed(seed)
    base = transformer.config
    names = ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim")
    settings = {name: base[name] for name in names} | {"num_layers": 1, "num_single_layers": 1}
    with warnings.catch_warnings():
        # diffusers warns of a class that its own control net uses.
        warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
        net = FluxControlNetModel(**{**settings, "axes_dims_rope": base.axes_dims_rope, **changes}).eval()
    # A new control net adds nothing: its last layers are zero.
    for weight in net.parameters():
        if not weight.any():
            weight.data.normal_(std=0.2)
    return net.to(transformer.dtype)


def write_clip_vision(directory: Path, num_features: int = 12) -> None:
    """Write a small CLIP vision model with random weights to a new directory."""
    torch.manual_seed(6)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=num_features,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(directory)


def ip_adapter(seed: int, transformer: Any, num_features: int = 12) -> dict[str, torch.Tensor]:
    """Make a random IP adapter for a transformer, with the names of the published one."""
    generator = torch.Generator().manual_seed(seed)
    width, inner = transformer.config.joint_attention_dim, transformer.inner_dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "ip_adapter_proj_model.proj.weight": random(4 * width, num_features),
        "ip_adapter_proj_model.proj.bias": random(4 * width),
        "ip_adapter_proj_model.norm.weight": random(width),
        "ip_adapter_proj_model.norm.bias": random(width),
    }
    for block in range(transformer.config.num_layers):
        for kind in "kv":
            name = f"double_blocks.{block}.processor.ip_adapter_double_stream_{kind}_proj"
            tensors |= {f"{name}.weight": 0.3 * random(inner, width), f"{name}.bias": random(inner)}
    return tensors


def ip_adapter_for(directory: Path, seed: int, num_features: int = 12) -> bytes:
    """Return a file with a random IP adapter for the weights in a directory."""
    transformer = FluxTransformer2DModel.from_pretrained(directory / "transformer")
    return save(ip_adapter(seed, transformer, num_features))
