"""Weights as single files: safetensors under diffusers' and Black Forest Labs' names, and GGUF."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file

COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
Tensors = Mapping[str, torch.Tensor]
#: Black Forest Labs' names of what diffusers names otherwise, as patterns. Of a joined matrix, only the first part.
_RENAMED = {
    r"time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    r"time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    r"time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    r"time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    r"time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    r"time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    r"context_embedder": "txt_in",
    r"x_embedder": "img_in",
    r"norm_out.linear": "final_layer.adaLN_modulation.1",
    r"proj_out": "final_layer.linear",
    r"transformer_blocks.(\d+).norm1.linear": r"double_blocks.\1.img_mod.lin",
    r"transformer_blocks.(\d+).norm1_context.linear": r"double_blocks.\1.txt_mod.lin",
    r"transformer_blocks.(\d+).attn.to_q": r"double_blocks.\1.img_attn.qkv",
    r"transformer_blocks.(\d+).attn.add_q_proj": r"double_blocks.\1.txt_attn.qkv",
    r"transformer_blocks.(\d+).attn.norm_q": r"double_blocks.\1.img_attn.norm.query_norm",
    r"transformer_blocks.(\d+).attn.norm_k": r"double_blocks.\1.img_attn.norm.key_norm",
    r"transformer_blocks.(\d+).attn.norm_added_q": r"double_blocks.\1.txt_attn.norm.query_norm",
    r"transformer_blocks.(\d+).attn.norm_added_k": r"double_blocks.\1.txt_attn.norm.key_norm",
    r"transformer_blocks.(\d+).attn.to_out.0": r"double_blocks.\1.img_attn.proj",
    r"transformer_blocks.(\d+).attn.to_add_out": r"double_blocks.\1.txt_attn.proj",
    r"transformer_blocks.(\d+).ff.net.0.proj": r"double_blocks.\1.img_mlp.0",
    r"transformer_blocks.(\d+).ff.net.2": r"double_blocks.\1.img_mlp.2",
    r"transformer_blocks.(\d+).ff_context.net.0.proj": r"double_blocks.\1.txt_mlp.0",
    r"transformer_blocks.(\d+).ff_context.net.2": r"double_blocks.\1.txt_mlp.2",
    r"single_transformer_blocks.(\d+).norm.linear": r"single_blocks.\1.modulation.lin",
    r"single_transformer_blocks.(\d+).attn.to_q": r"single_blocks.\1.linear1",
    r"single_transformer_blocks.(\d+).attn.norm_q": r"single_blocks.\1.norm.query_norm",
    r"single_transformer_blocks.(\d+).attn.norm_k": r"single_blocks.\1.norm.key_norm",
    r"single_transformer_blocks.(\d+).proj_out": r"single_blocks.\1.linear2",
}
_AUTOENCODER = (
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda match: f"up.{3 - int(match[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{3 - int(match[1])}.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"group_norm", "norm"),
    (r"to_([qkv])", r"\1"),
    (r"to_out\.0", "proj_out"),
)
#: The prefixes that ComfyUI writes in whole checkpoints.
COMFY_PREFIXES = {
    "transformer": "model.diffusion_model.",
    "vae": "vae.",
    "text_encoder": "text_encoders.clip_l.transformer.text_model.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
}


def tensors_of(module: Any) -> dict[str, torch.Tensor]:
    """Return copies of a module's tensors, because safetensors files hold no tensor under two names."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def original_transformer(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return a transformer's tensors under Black Forest Labs' names, joined as their files join them."""
    original = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        joined = [tensor]
        if layer.endswith(("to_q", "add_q_proj")):
            others = [layer.replace("_q", letter) for letter in ("_k", "_v")]
            if layer.startswith("single"):
                others.append(layer.replace("attn.to_q", "proj_mlp"))
            joined += [tensors[f"{other}.{kind}"] for other in others]
        if layer == "norm_out.linear":
            # diffusers swaps scale and shift.
            joined = list(tensor.chunk(2))[::-1]
        for pattern, replacement in _RENAMED.items():
            if re.fullmatch(pattern, layer):
                is_scale = layer.endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k"))
                new = re.sub(pattern, replacement, layer)
                original[f"{new}.{'scale' if is_scale else kind}"] = torch.cat(joined)
    return original


def original_autoencoder(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return an autoencoder's tensors under Black Forest Labs' names, where attention is a convolution of 1x1."""
    original = {}
    for name, tensor in tensors.items():
        is_matrix = "attentions" in name and name.endswith("weight") and tensor.dim() == 2
        new = name
        for pattern, replacement in _AUTOENCODER:
            new = re.sub(pattern, replacement, new)
        original[new] = tensor[..., None, None].contiguous() if is_matrix else tensor
    return original


def write_whole(path: Path, pipeline: FluxPipeline, *, original: bool) -> Path:
    """Write a whole checkpoint, as ComfyUI does or under diffusers' names; return the path."""
    components = {name: tensors_of(getattr(pipeline, name)) for name in COMPONENTS}
    prefixes = {name: f"{name}." for name in COMPONENTS}
    if original:
        components["transformer"] = original_transformer(components["transformer"])
        components["vae"] = original_autoencoder(components["vae"])
        prefixes = COMFY_PREFIXES
    tensors = {f"{prefixes[part]}{name}": value for part, each in components.items() for name, value in each.items()}
    if original:
        tensors["text_encoders.t5xxl.logit_scale"] = torch.ones(1)
    save_file(tensors, path)
    return path


def write_gguf(path: Path, tensors: Tensors, kind: str, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a GGUF file whose matrices are of this type where their rows allow it, the others in F32; return the path.

    Matrices of K-quants, which the package `gguf` cannot make, are random blocks with small scales.
    """
    quantization = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[quantization]
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_quantization_version(2)
    for name, value in (metadata or {}).items():
        writer.add_array(name, value)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.shape[-1] % block:
            writer.add_tensor(name, tensor.float().numpy())
        elif kind.endswith("_K"):
            writer.add_tensor(name, random_blocks(tensor.shape, kind, generator).numpy(), raw_dtype=quantization)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


#: The positions of the scales, float16 numbers, in a block of each K-quant.
_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(shape: torch.Size, kind: str, generator: torch.Generator) -> torch.Tensor:
    """Return a matrix of random blocks of a K-quant, as bytes. Their scales keep the weights small."""
    block, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    sizes = (shape[0], shape[1] // block, num_bytes)
    blocks = torch.randint(0, 256, sizes, dtype=torch.uint8, generator=generator)
    for start in _SCALES[kind]:
        scale = torch.full((*sizes[:2], 1), 2e-5, dtype=torch.float16)
        blocks[..., start : start + 2] = scale.view(torch.uint8)
    return blocks.reshape(shape[0], -1)


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16", size: int = 2) -> Path:
    """Write a safetensors file whose tensors are zeros that take no space on disk; return the path."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + size * int(torch.Size(shape).numel())
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path
