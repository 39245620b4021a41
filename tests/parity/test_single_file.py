"""Single files against diffusers' own pipeline on the same file: the images differ in no pixel value."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, GGUFQuantizationConfig
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from safetensors.torch import save_file

from models.base import EngineConfig, SingleFile
from models.flux.acceleration import needs_fp8_copy, random_inputs
from models.flux.compilation import clone_sharing_weights
from models.flux.engine import FluxEngine
from models.flux.loader import load_engine
from models.loading import gguf_file, pipeline, single_file
from models.loading.hub import BadWeights
from models.loading.memory_plans import PLANS
from models.loading.pipeline import load_pipeline
from models.loading.specs import DEMO
from tests.parity.test_engine import call_diffusers
from tests.support import tiny_flux
from tests.support.single_files import original_transformer, tensors_of, write_gguf, write_whole
from tests.support.tiny_flux import difference, generate, make_request
from tests.support.tiny_kinds import write_demo_of_kind

#: The type is named, so that the tests mean the same on every CPU.
FLOAT32 = torch.float32
(RESIDENT,) = (plan for plan in PLANS if plan.name == "resident")


def engine_of(file: Path, base: Path, **changes: Any) -> FluxEngine:
    settings = {"device": "cpu", "dtype": "float32", **changes}
    return load_engine(EngineConfig(SingleFile(file, base), safety_checker=str(DEMO / "safety_checker"), **settings))


def reference(file: Path, base: Path, dtype: torch.dtype = FLOAT32, **options: Any) -> FluxPipeline:
    """Load a transformer from a file and the rest from its base, as diffusers' documentation does."""
    transformer = FluxTransformer2DModel.from_single_file(
        str(file), config=str(base), subfolder="transformer", dtype=dtype, local_files_only=True, **options
    )
    pipeline = FluxPipeline.from_pretrained(base, transformer=transformer, dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def gguf_reference(file: Path, base: Path, dtype: torch.dtype = FLOAT32) -> FluxPipeline:
    return reference(file, base, dtype, quantization_config=GGUFQuantizationConfig(compute_dtype=dtype))


def assert_equal_images(engine: FluxEngine, pipeline: FluxPipeline) -> None:
    for seed, prompt in enumerate(("a red apple", "a fish on blue")):
        request = make_request(prompt, 96, 64)
        (image,) = generate(engine, request, seed)
        assert difference(image, call_diffusers(pipeline, request, seed)) == 0


@pytest.fixture(scope="module")
def demo() -> dict[str, torch.Tensor]:
    """Return the tensors of the demo's transformer."""
    return tensors_of(FluxTransformer2DModel.from_pretrained(DEMO / "transformer", dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny pipeline in FLUX.1's layout, as a base."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_flux.pipeline(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_a_transformer_alone(demo: Mapping[str, torch.Tensor], dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "transformer.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in demo.items()}, file)
    assert_equal_images(engine_of(file, DEMO), reference(file, DEMO))


@pytest.mark.parametrize("kind", ["fill", "control"])
def test_variants_that_take_more_channels_have_the_same_base(kind: str, tmp_path: Path) -> None:
    """The base is that of a transformer that sees only latents and text; diffusers loads the same from a directory."""
    directory = write_demo_of_kind(tmp_path / kind, kind)
    engine = engine_of(directory / "transformer" / "diffusion_pytorch_model.safetensors", DEMO)
    assert engine.kind == kind
    expected = FluxTransformer2DModel.from_pretrained(directory / "transformer", dtype=FLOAT32)
    found = engine.pipeline.transformer
    assert (found.config.in_channels, found.config.out_channels) == (
        expected.config.in_channels,
        expected.config.out_channels,
    )
    expected_tensors = tensors_of(expected)
    assert expected_tensors.keys() == tensors_of(found).keys()
    assert all(torch.equal(tensor, expected_tensors[name]) for name, tensor in tensors_of(found).items())


def test_channels_that_no_variant_takes_are_refused(demo: Mapping[str, torch.Tensor], tmp_path: Path) -> None:
    file, embedder = tmp_path / "transformer.safetensors", demo["x_embedder.weight"]
    save_file({**demo, "x_embedder.weight": embedder[:, :-8].contiguous()}, file)
    with pytest.raises(BadWeights, match="gives 96 channels, but the transformer takes 88"):
        engine_of(file, DEMO)


def test_a_whole_checkpoint_replaces_every_component_of_the_base(tiny: Path, tmp_path: Path) -> None:
    """The base has other weights than the file, so that an image shows which were used."""
    pipeline = tiny_flux.pipeline(torch.bfloat16)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        for parameter in getattr(pipeline, name).parameters():
            parameter.data.mul_(1.1)
    file = write_whole(tmp_path / "whole.safetensors", pipeline, original=False)
    engine = engine_of(file, tiny, dtype="bfloat16")
    assert_equal_images(engine, pipeline)
    with pytest.raises(AssertionError):
        assert_equal_images(engine, FluxPipeline.from_pretrained(tiny, dtype=torch.bfloat16))


# -- GGUF


@pytest.mark.parametrize("memory", ["resident", "group-offload"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "BF16", "F16"])
def test_gguf(demo: Mapping[str, torch.Tensor], kind: str, memory: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "demo.gguf", demo, kind, {"a.list": [1, 2, 3], "some.texts": ["a", "b"]})
    engine = engine_of(file, DEMO, memory=memory)
    assert single_file.read(file).description == engine.info().form == f"GGUF {kind}"
    assert_equal_images(engine, gguf_reference(file, DEMO))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_gguf_blocks_compile_whole(demo: Mapping[str, torch.Tensor], kind: str, tmp_path: Path) -> None:
    """On GPUs the tiers run them compiled: no size needs another graph, and no output differs."""
    transformer = engine_of(write_gguf(tmp_path / "demo.gguf", demo, kind), DEMO).pipeline.transformer
    assert not needs_fp8_copy(transformer, RESIDENT)
    compiled = clone_sharing_weights(transformer)
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, _: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=count)
    numbers = []
    for num_tokens in (48, 80, 63):
        inputs = random_inputs(transformer.config, (1, num_tokens, 64), "cpu", FLOAT32)
        with torch.no_grad():
            assert torch.equal(compiled(**inputs)[0], transformer(**inputs)[0])
        numbers.append(len(graphs))
    assert numbers[0] > 0 and numbers == numbers[:1] * 3


def test_gguf_in_bf16(demo: Mapping[str, torch.Tensor], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "demo.gguf", demo, "Q4_0")
    assert_equal_images(engine_of(file, DEMO, dtype="bfloat16"), gguf_reference(file, DEMO, torch.bfloat16))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_dequantized_as_diffusers_does(kind: str, tmp_path: Path) -> None:
    """The blocks of K-quants hold 256 numbers, so the transformer is 256 wide."""
    settings = {"attention_head_dim": 128, "axes_dims_rope": (16, 56, 56), "joint_attention_dim": 256}
    transformer = tiny_flux.transformer(**settings)
    pipeline = tiny_flux.pipeline()
    pipeline.text_encoder_2 = type(pipeline.text_encoder_2)(
        type(pipeline.text_encoder_2.config)(**{**pipeline.text_encoder_2.config.to_dict(), "d_model": 256})
    )
    pipeline.transformer = transformer
    pipeline.save_pretrained(tmp_path / "base")
    file = write_gguf(tmp_path / "tiny.gguf", tensors_of(transformer), kind)
    engine, expected = engine_of(file, tmp_path / "base"), gguf_reference(file, tmp_path / "base")
    loaded = dict(engine.pipeline.transformer.named_parameters())
    num_quantized = 0
    for name, parameter in expected.transformer.named_parameters():
        assert type(parameter) is type(loaded[name])
        assert torch.equal(dequantize_gguf_tensor(parameter), dequantize_gguf_tensor(loaded[name]))
        num_quantized += isinstance(parameter, GGUFParameter)
    assert num_quantized > 20
    assert_equal_images(engine, expected)


def test_quantized_tensors_that_are_no_matrices_are_dequantized(tmp_path: Path) -> None:
    """diffusers would add the bytes of such a bias, not its numbers."""
    bias = torch.arange(64, dtype=FLOAT32)
    tensors = {"x.weight": torch.ones(4, 64), "x.bias": bias[None]}
    file = write_gguf(tmp_path / "bias.gguf", tensors, "BF16")
    infos = gguf_file.read_header(file)
    flat = {"x.bias": type(infos["x.bias"])("BF16", (64,), infos["x.bias"].offset, infos["x.bias"].num_bytes)}
    assert torch.equal(gguf_file.load(file, flat)["x.bias"], bias)


# -- Black Forest Labs' names, whose conversion needs FLUX.1's width


@pytest.fixture(scope="module")
def wide() -> FluxPipeline:
    """Build a pipeline with FLUX.1's width, of one block of each kind; its weights take a gigabyte in bf16."""
    pipeline = tiny_flux.pipeline(torch.bfloat16)
    settings = {**pipeline.transformer.config, "num_layers": 1, "num_single_layers": 1}
    settings |= {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(settings).to(torch.bfloat16)
    torch.manual_seed(5)
    row = 0.02 * torch.randn(2**22, dtype=torch.bfloat16)
    transformer.to_empty(device="cpu")
    for parameter in transformer.parameters():
        # Shifted by a different number for each tensor, because random numbers for all of them would take long.
        numbers = row.roll(parameter.numel() % 1000 + 7 * parameter.dim())
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(numbers)):
            piece = flat[start : start + len(numbers)]
            piece.copy_(numbers[: len(piece)])
    pipeline.transformer = transformer.eval()
    return pipeline


@pytest.mark.thorough
def test_original_names(wide: FluxPipeline, tmp_path: Path) -> None:
    wide.save_pretrained(tmp_path / "base")
    file = tmp_path / "flux1-dev.safetensors"
    save_file(original_transformer(tensors_of(wide.transformer)), file)
    engine = engine_of(file, tmp_path / "base", dtype="bfloat16")
    assert_equal_images(engine, reference(file, tmp_path / "base", torch.bfloat16))
    assert_equal_images(engine, wide)


@pytest.mark.thorough
def test_a_whole_checkpoint_with_original_names(wide: FluxPipeline, tmp_path: Path) -> None:
    wide.save_pretrained(tmp_path / "base")
    file = write_whole(tmp_path / "whole.safetensors", wide, original=True)
    engine = engine_of(file, tmp_path / "base", dtype="bfloat16")
    pipeline = FluxPipeline.from_single_file(
        str(file), config=str(tmp_path / "base"), dtype=torch.bfloat16, local_files_only=True
    )
    # diffusers leaves this encoder in training mode, in which dropout changes each image.
    pipeline.text_encoder_2.eval()
    pipeline.set_progress_bar_config(disable=True)
    assert_equal_images(engine, pipeline)
    assert_equal_images(engine, wide)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K"])
def test_gguf_with_original_names(wide: FluxPipeline, kind: str, tmp_path: Path) -> None:
    wide.save_pretrained(tmp_path / "base")
    file = write_gguf(tmp_path / "flux1-dev.gguf", original_transformer(tensors_of(wide.transformer)), kind)
    engine = engine_of(file, tmp_path / "base", dtype="bfloat16")
    assert_equal_images(engine, gguf_reference(file, tmp_path / "base", torch.bfloat16))


def test_nothing_of_the_base_is_loaded_in_place_of_the_files_weights(
    demo: Mapping[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "demo.gguf", demo, "Q8_0")
    loaded: list[str] = []
    load_part = pipeline._load_part

    def load(directory: Path, name: str, dtype: torch.dtype) -> Any:
        loaded.append(name)
        return load_part(directory, name, dtype)

    monkeypatch.setattr(pipeline, "_load_part", load)
    load_pipeline(EngineConfig(SingleFile(file, DEMO), safety_checker="", device="cpu"))
    assert sorted(loaded) == ["scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"]
