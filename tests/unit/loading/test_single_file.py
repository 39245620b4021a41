"""Tests of headers: hostile files are refused before anything is loaded, and misfits are named."""

import struct
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from models.base import EngineConfig, SingleFile
from models.loading import single_file
from models.loading.hub import BadWeights
from models.loading.pipeline import load_pipeline
from models.loading.specs import DEMO
from tests.support import hostile_weights, tiny_flux
from tests.support.single_files import original_transformer, tensors_of, write_sparse

#: The memory in which every header can be refused. It holds the 8 MiB of a header and its objects.
MAX_BYTES = 150e6
Shapes = dict[str, tuple[int, ...]]


def refusal(file: Path, base: Path = DEMO) -> str:
    """Return the message with which a file is refused."""
    with pytest.raises(BadWeights) as error:
        load_pipeline(EngineConfig(SingleFile(file, base), safety_checker="", device="cpu"))
    return str(error.value)


@pytest.mark.parametrize("name", hostile_weights.FILES)
def test_hostile_files_are_refused_with_the_tensor_or_field(name: str, tmp_path: Path) -> None:
    file = hostile_weights.write(tmp_path, name)
    tracemalloc.start()
    try:
        message = refusal(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(file) in message and hostile_weights.FILES[name][1] in message
    assert len(message) < 1000
    assert peak < MAX_BYTES


# -- files that are no FLUX transformer, or do not fit the base


@pytest.fixture(scope="module")
def demo() -> Shapes:
    """Return the shapes of the demo's transformer."""
    return shapes_of(tensors_of(FluxTransformer2DModel.from_pretrained(DEMO / "transformer")))


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def change(**changes: tuple[int, ...] | None) -> Callable[[Shapes], Shapes]:
    """Return a function that adds tensors to shapes, or removes those that are None. Double underscores are dots."""

    def changed(shapes: Shapes) -> Shapes:
        named = {name.replace("__", "."): shape for name, shape in changes.items()}
        return {name: shape for name, shape in {**shapes, **named}.items() if shape is not None}

    return changed


MISFITS: dict[str, tuple[Callable[[Shapes], Shapes], str]] = {
    "a LoRA": (lambda _: {"transformer.x_embedder.lora_A.weight": (4, 8)}, "is a LoRA, not weights; name it in a requ"),
    "Nunchaku": (
        lambda _: {"transformer_blocks.0.qkv_proj.qweight": (4, 8), "transformer_blocks.0.qkv_proj.wscales": (4, 8)},
        "is for the library Nunchaku (SVDQuant)",
    ),
    "bitsandbytes": (
        change(x_embedder__weight__absmax=(4,)),
        "is quantized by bitsandbytes, which diffusers loads as a directory only",
    ),
    "scaled fp8": (change(x_embedder__scale_weight=(1,)), "is fp8 with scales"),
    "an autoencoder": (
        lambda _: {"encoder.conv_in.weight": (4, 4, 3, 3), "decoder.conv_in.weight": (4, 4, 3, 3)},
        "holds no transformer of FLUX.1: its tensors are named decoder.conv_in.weight, encoder.conv_in.weight",
    ),
    "Stable Diffusion XL": (
        lambda _: {
            "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
        },
        "'conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight' is of no component",
    ),
    "FLUX.2": (
        lambda _: {"double_blocks.0.img_attn.qkv.weight": (4, 8), "single_stream_modulation.lin.weight": (4, 8)},
        "holds no transformer of FLUX.1: it looks like flux-2-dev",
    ),
    "a tensor too many": (change(extra__weight=(4,)), "has 1 tensors that"),
    "a tensor missing": (change(proj_out__bias=None), "lacks 1 tensors: proj_out.bias"),
    "a wrong shape": (change(x_embedder__weight=(3, 3)), "'x_embedder.weight' has the shape [3, 3], but"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_files_that_do_not_fit_are_refused(name: str, demo: Shapes, tmp_path: Path) -> None:
    changed, expected = MISFITS[name]
    file = write_sparse(tmp_path / "file.safetensors", changed(demo))
    message = refusal(file)
    assert str(file) in message and expected in message


def test_a_tensor_of_no_component_in_a_whole_checkpoint_is_named(demo: Shapes, tmp_path: Path) -> None:
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in demo.items()}
    file = write_sparse(tmp_path / "file.safetensors", {**shapes, "stranger.weight": (4,)})
    assert "'stranger.weight' is of no component of a FLUX pipeline" in refusal(file)


def test_an_incomplete_text_encoder_is_named(demo: Shapes, tmp_path: Path) -> None:
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in demo.items()}
    shapes["text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight"] = (8, 8)
    assert "lacks" in refusal(write_sparse(tmp_path / "file.safetensors", shapes))


# -- Black Forest Labs' names, in files that take no space on disk


@pytest.fixture(scope="module")
def wide() -> tuple[FluxTransformer2DModel, Shapes]:
    """Return a transformer of FLUX.1's width without memory, and the shapes of its tensors in an original file."""
    with torch.device("meta"):
        transformer = tiny_flux.transformer(
            num_attention_heads=24, attention_head_dim=128, axes_dims_rope=(16, 56, 56), num_single_layers=1
        )
        return transformer, shapes_of(original_transformer(tensors_of(transformer)))


@pytest.fixture
def wide_base(wide: tuple[FluxTransformer2DModel, Shapes], tmp_path: Path) -> Path:
    """Write the configuration of the wide transformer."""
    wide[0].save_config(tmp_path / "base" / "transformer")
    return tmp_path / "base"


def check(shapes: Shapes, base: Path, directory: Path) -> None:
    single_file.check(single_file.read(write_sparse(directory / "flux1-dev.safetensors", shapes)), base)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_original_names_fit(
    wide: tuple[FluxTransformer2DModel, Shapes], prefix: str, wide_base: Path, tmp_path: Path
) -> None:
    check({prefix + name: shape for name, shape in wide[1].items()}, wide_base, tmp_path)


def test_the_base_of_one_variant_is_that_of_all(
    wide: tuple[FluxTransformer2DModel, Shapes], wide_base: Path, tmp_path: Path
) -> None:
    """FLUX.1 Fill takes 384 channels, and its base here is that of [dev], which takes fewer."""
    check(change(img_in__weight=(3072, 384))(wide[1]), wide_base, tmp_path)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (change(double_blocks__0__img_mod__lin__bias=None), "lacks 'double_blocks.0.img_mod.lin.bias', which FLUX.1's"),
        (change(double_blocks__x__bias=(4,)), "flux1-dev.safetensors cannot be loaded"),
        (change(single_blocks__0__linear1__bias=(100,)), "'single_blocks.0.linear1.bias' has 100 rows, but FLUX.1 has"),
        (change(stranger__bias=(100,)), "has 1 tensors that"),
        (change(img_in__weight=(384, 3072)), "has the shape [384, 3072], but"),
    ],
)
def test_original_names_that_do_not_fit_are_refused(
    wide: tuple[FluxTransformer2DModel, Shapes],
    changed: Callable[[Shapes], Shapes],
    expected: str,
    wide_base: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(BadWeights) as error:
        check(changed(wide[1]), wide_base, tmp_path)
    assert expected in str(error.value)


def test_a_truncated_file_is_refused_at_every_byte_of_its_header(tmp_path: Path) -> None:
    content = hostile_weights.gguf(
        [hostile_weights.info(b"x.y", (32, 8), hostile_weights.Q8_0)],
        [hostile_weights.field(b"general.alignment", hostile_weights.UINT32, struct.pack("<I", 32))],
        num_bytes=500,
    )
    file = tmp_path / "file.gguf"
    file.write_bytes(content)
    assert "holds no transformer of FLUX.1" in refusal(file)
    for length in range(len(content) - 250):
        file.write_bytes(content[:length])
        with pytest.raises(BadWeights, match=str(file)):
            single_file.read(file)
