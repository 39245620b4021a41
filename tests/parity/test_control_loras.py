"""Control LoRAs against diffusers' own pipelines, bit for bit, and what they leave of the base weights."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import PIL.Image
import pytest
import torch
from diffusers import FluxControlImg2ImgPipeline, FluxControlPipeline, FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from PIL.Image import Image

from models.base import GenerationFailed, IncompatibleInput
from models.flux import control, lora_weights
from models.flux.control import DepthEstimator
from models.flux.engine import FluxEngine
from models.flux.loras import LoraManager
from models.flux_control import FluxLoraCannyInput, FluxLoraDepthInput
from models.flux_control_lora import (
    FluxControlLoraCannyImageToImageInput,
    FluxControlLoraCannyInput,
    FluxControlLoraDepthImageToImageInput,
    FluxControlLoraDepthInput,
)
from models.flux_lora import FluxLoraInput
from tests.support import tiny_flux
from tests.support.diffusers_calls import image_of, pipeline_of
from tests.support.tiny_flux import AllSafeChecker, AlwaysShare, difference, finish_task, tiers_of, write_lora
from tests.support.tiny_kinds import write_control_lora, write_depth

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

SIZE = (80, 64)
HEADS = (2, 16)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Write an image to follow, an image to start from, LoRAs, and weights that find depths; return their paths."""
    pixels = numpy.random.default_rng(3).integers(0, 3, (*SIZE[::-1], 3), dtype=numpy.uint8)
    pixels[20:50, 30:60] += 200
    PIL.Image.fromarray(pixels).save(tmp_path / "followed.png")
    PIL.Image.fromarray(pixels[:, ::-1].copy()).save(tmp_path / "start.png")
    for seed, name in enumerate(("canny", "depth")):
        write_control_lora(tmp_path / f"{name}.safetensors", seed, 16, HEADS)
    write_lora(tmp_path / "style.safetensors", 7)
    write_depth(tmp_path / "estimator")
    return {path.stem: path for path in tmp_path.iterdir()}


def engine_of(files: dict[str, Path], dtype: torch.dtype = torch.float32) -> FluxEngine:
    pipeline = tiny_flux.pipeline(dtype)
    return FluxEngine(
        pipeline,
        AllSafeChecker(),
        tiers_of(pipeline.transformer),
        "cpu",
        depth_estimator=DepthEstimator.load(files["estimator"], "cpu", torch.float32),
        control_loras={name: files[name] for name in ("canny", "depth")},
    )


def request_of(kind: Any, **fields: Any) -> Any:
    body = {"prompt": "a fish", "num_inference_steps": 4, "image_size": {"width": SIZE[0], "height": SIZE[1]}}
    urls = {"control_lora_image_url": "unused", **({"image_url": "unused"} if "strength" in kind.model_fields else {})}
    return kind.model_validate({**body, **urls, **fields})


def generate(engine: FluxEngine, request: Any, files: dict[str, Path]) -> Image:
    inputs = {"control_lora_image_url": files["followed"]}
    if hasattr(request, "strength"):
        inputs["image_url"] = files["start"]
    inputs |= {f"loras.{place}.path": files["style"] for place in range(len(request.loras))}
    (image,) = finish_task(engine, engine.start(request, 5, inputs))
    return image


def call_diffusers(kind: Any, dtype: torch.dtype, request: Any, followed: Image, *adapters: tuple[Path, float]) -> Any:
    """Generate the request's image with a pipeline of diffusers and these LoRAs, of which the first is a control."""
    pipeline = pipeline_of(kind, tiny_flux.pipeline(dtype).components)
    for path, _ in adapters:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=path.stem)
    pipeline.set_adapters([path.stem for path, _ in adapters], [scale for _, scale in adapters])
    start: dict[str, Any] = {}
    if kind is FluxControlImg2ImgPipeline:
        start["image"] = PIL.Image.open(adapters[0][0].parent / "start.png")
    return image_of(pipeline, request, SIZE, control_image=followed, **start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        (FluxControlPipeline, FluxControlLoraCannyInput),
        (FluxControlImg2ImgPipeline, FluxControlLoraCannyImageToImageInput),
    ],
)
def test_canny_equals_the_pipeline(files: dict[str, Path], dtype: torch.dtype, kind: Any, ours: Any) -> None:
    edges = control.edges(PIL.Image.open(files["followed"]), SIZE)
    engine = engine_of(files, dtype)
    for strength, scales in ((1.0, []), (0.7, [0.6])):
        loras = [{"path": "unused", "scale": scale} for scale in scales]
        request = request_of(ours, control_lora_strength=strength, loras=loras)
        adapters = [(files["canny"], strength), *((files["style"], scale) for scale in scales)]
        expected = call_diffusers(kind, dtype, request, edges, *adapters)
        assert difference(generate(engine, request, files), expected) == 0


@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        (FluxControlPipeline, FluxControlLoraDepthInput),
        (FluxControlImg2ImgPipeline, FluxControlLoraDepthImageToImageInput),
    ],
)
def test_depth_equals_the_pipeline(files: dict[str, Path], kind: Any, ours: Any) -> None:
    engine = engine_of(files)
    followed = PIL.Image.open(files["followed"])
    assert engine.depth_estimator
    depths = engine.depth_estimator.depths(followed, SIZE)
    request = request_of(ours)
    expected = call_diffusers(kind, torch.float32, request, depths, (files["depth"], 1.0))
    assert difference(generate(engine, request, files), expected) == 0


def test_an_image_of_depths_is_taken_as_it_is(files: dict[str, Path]) -> None:
    request = request_of(FluxControlLoraDepthInput, preprocess_depth=False)
    followed = PIL.Image.open(files["followed"])
    expected = call_diffusers(FluxControlPipeline, torch.float32, request, followed, (files["depth"], 1.0))
    assert difference(generate(engine_of(files), request, files), expected) == 0


def test_without_a_control_image_the_image_is_that_of_the_base(files: dict[str, Path]) -> None:
    engine = engine_of(files)
    request = FluxControlLoraCannyInput.model_validate(
        {"prompt": "a fish", "num_inference_steps": 2, "image_size": {"width": SIZE[0], "height": SIZE[1]}}
    )
    (image,) = finish_task(engine, engine.start(request, 5))
    (base,) = finish_task(engine, engine.start(tiny_flux.make_request("a fish", *SIZE), 5))
    assert difference(image, base) == 0


def fingerprint(engine: FluxEngine) -> str:
    """Return a hash of the transformer's configuration, and of the names, shapes and every bit of its weights."""
    digest = hashlib.sha256()
    digest.update(str(engine.pipeline.transformer.config).encode())
    for key, weight in sorted(engine.pipeline.transformer.state_dict().items()):
        digest.update(f"{key}{weight.shape}".encode())
        digest.update(weight.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_the_base_weights_never_change(files: dict[str, Path]) -> None:
    """Two control LoRAs in turn give the images that each gives alone, and leave no trace in the base weights."""
    engine = engine_of(files)
    before = fingerprint(engine)
    kinds = (FluxControlLoraCannyInput, FluxControlLoraDepthInput)
    alone = [generate(engine_of(files), request_of(kind), files) for kind in kinds]
    for _ in range(2):
        for kind, expected in zip(kinds, alone, strict=True):
            assert difference(generate(engine, request_of(kind), files), expected) == 0
    assert fingerprint(engine) == before


def test_the_servers_control_loras_stay_until_memory_runs_out(files: dict[str, Path]) -> None:
    engine = engine_of(files)
    engine.loras = LoraManager(engine.pipeline, kept_bytes=0)
    request = request_of(FluxControlLoraCannyInput, loras=[{"path": "unused"}])
    first = generate(engine, request, files)
    generate(engine, request_of(FluxControlLoraDepthInput), files)
    assert engine.loras.names == ["canny", "depth"]
    engine.loras.unload_idle(())
    assert engine.loras.names == []
    assert difference(generate(engine, request, files), first) == 0


def test_files_with_the_same_name_are_different_loras(files: dict[str, Path], tmp_path: Path) -> None:
    names = ("canny", "depth")
    for name in names:
        (tmp_path / name).mkdir()
        files[name] = files[name].rename(tmp_path / name / "lora.safetensors")
    engine = engine_of(files)
    for kind in (FluxControlLoraCannyInput, FluxControlLoraDepthInput):
        alone = generate(engine_of(files), request_of(kind), files)
        assert difference(generate(engine, request_of(kind), files), alone) == 0


class Shared(FluxControlLoraCannyInput):
    """A request whose forwards are shared."""

    acceleration: str = "regular"


def test_requests_with_the_same_control_lora_share_forwards(files: dict[str, Path]) -> None:
    engine = engine_of(files)
    engine.sharing = AlwaysShare()
    sources = ("followed", "start")
    alone = [finish_task(engine, started(engine, Shared, files, source))[0] for source in sources]
    tasks = [started(engine, Shared, files, source) for source in sources]
    others = [
        started(engine, Shared, files, "followed", control_lora_strength=0.5),
        engine.start(tiny_flux.make_request("a fish", *SIZE, acceleration="regular"), 5),
    ]
    assert engine.advance(tasks[0], [*tasks[1:], *others]) == tasks
    while tasks[0].step < tasks[0].num_steps:
        engine.advance(tasks[0], tasks[1:])
    for task, expected in zip(tasks, alone, strict=True):
        assert difference(finish_task(engine, task)[0], expected) <= 1


def started(engine: FluxEngine, kind: Any, files: dict[str, Path], source: str, **fields: Any) -> Any:
    """Start a task that follows this image."""
    return engine.start(request_of(kind, **fields), 5, {"control_lora_image_url": files[source]})


def test_tasks_that_take_turns_do_not_change_each_other(files: dict[str, Path]) -> None:
    """Take turns, step by step, with control LoRAs, without, and with the same other LoRA in two of the clones."""

    def tasks(engine: FluxEngine) -> list[Any]:
        style = {"path": "unused", "scale": 0.6}
        followed, lora = {"control_lora_image_url": files["followed"]}, {"loras.0.path": files["style"]}
        size = {"width": SIZE[0], "height": SIZE[1]}
        plain = FluxLoraInput.model_validate(
            {"prompt": "a fish", "image_size": size, "num_inference_steps": 4, "loras": [style]}
        )
        return [
            engine.start(request_of(FluxControlLoraCannyInput, loras=[style]), 5, {**followed, **lora}),
            engine.start(plain, 5, lora),
            started(engine, FluxControlLoraDepthInput, files, "followed"),
            engine.start(tiny_flux.make_request("a fish", *SIZE, num_inference_steps=4), 5),
        ]

    expected = [finish_task(engine, task)[0] for engine in [engine_of(files)] for task in tasks(engine)]
    engine = engine_of(files)
    turns = tasks(engine)
    for _ in range(4):
        for task in turns:
            engine.advance(task)
    for task, image in zip(turns, expected, strict=True):
        assert difference(finish_task(engine, task)[0], image) == 0


def test_at_strength_0_the_image_does_not_follow_the_matrices(files: dict[str, Path]) -> None:
    """A control LoRA's weights of normalizations have no scale, in diffusers as here."""
    edges = control.edges(PIL.Image.open(files["followed"]), SIZE)
    request = request_of(FluxControlLoraCannyInput, control_lora_strength=0)
    expected = call_diffusers(FluxControlPipeline, torch.float32, request, edges, (files["canny"], 0.0))
    assert difference(generate(engine_of(files), request, files), expected) == 0


@pytest.mark.parametrize("kind", [FluxLoraCannyInput, FluxLoraDepthInput])
def test_the_endpoints_of_canny_and_depth_run_on_a_control_lora(files: dict[str, Path], kind: Any) -> None:
    """Without the weights of Canny and Depth, [dev] with the control LoRA of strength 1 generates their images."""
    engine = engine_of(files)
    own = FluxControlLoraCannyInput if kind is FluxLoraCannyInput else FluxControlLoraDepthInput
    expected = generate(engine, request_of(own, guidance_scale=5), files)
    request = kind.model_validate({**request_of(own, guidance_scale=5).model_dump(), "image_url": "unused"})
    (image,) = finish_task(engine, engine.start(request, 5, {"image_url": files["followed"]}))
    assert difference(image, expected) == 0
    engine.control_loras = {}
    with pytest.raises(GenerationFailed, match="-dev-lora is missing here"):
        engine.start(request, 5, {"image_url": files["followed"]})


def test_a_missing_control_lora_is_named(files: dict[str, Path]) -> None:
    engine = tiny_flux.engine()
    with pytest.raises(GenerationFailed, match=r"FLUX\.1-Canny-dev-lora is missing here"):
        generate(engine, request_of(FluxControlLoraCannyInput), files)


def test_a_bad_lora_of_the_client_is_named_by_its_place_and_changes_nothing(files: dict[str, Path]) -> None:
    engine = engine_of(files)
    expected = generate(engine, request_of(FluxControlLoraCannyInput), files)
    write_lora(files["style"], 7, width=48)
    with pytest.raises(IncompatibleInput) as error:
        generate(engine, request_of(FluxControlLoraCannyInput, loras=[{"path": "unused"}]), files)
    assert error.value.loc == ("loras", 0, "path")
    assert difference(generate(engine, request_of(FluxControlLoraCannyInput), files), expected) == 0


def write_ordinary(path: Path) -> None:
    write_lora(path, 7)


def write_for_another(path: Path) -> None:
    write_control_lora(path, 1, 16, (4, 16))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("damage", [write_ordinary, write_for_another, cut_off, Path.unlink])
def test_a_control_lora_of_the_server_that_does_not_fit_is_logged(
    files: dict[str, Path], caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    engine = engine_of(files)
    damage(files["canny"])
    with pytest.raises(GenerationFailed, match=r"^The server's control LoRA for canny cannot be loaded; its log says"):
        generate(engine, request_of(FluxControlLoraCannyInput), files)
    assert str(files["canny"]) in caplog.text
    generate(engine, request_of(FluxControlLoraDepthInput), files)


def test_the_published_layout_fits_the_true_transformer() -> None:
    """A control LoRA with Black Forest Labs' names and shapes passes the check."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    tensors: dict[str, torch.Tensor] = {}

    def add(name: str, taken: int, given: int) -> None:
        tensors[f"{name}.lora_A.weight"] = torch.zeros(2, taken)
        tensors[f"{name}.lora_B.weight"] = torch.zeros(given, 2)
        tensors[f"{name}.lora_B.bias"] = torch.zeros(given)

    width = 3072
    add("img_in", 128, width)
    add("txt_in", 4096, width)
    for name, taken in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        add(f"{name}.in_layer", taken, width)
        add(f"{name}.out_layer", width, width)
    for block in range(19):
        for stream in ("img", "txt"):
            start = f"double_blocks.{block}.{stream}"
            add(f"{start}_mod.lin", width, 6 * width)
            add(f"{start}_attn.qkv", width, 3 * width)
            add(f"{start}_attn.proj", width, width)
            add(f"{start}_mlp.0", width, 4 * width)
            add(f"{start}_mlp.2", 4 * width, width)
            for norm in ("query_norm", "key_norm"):
                tensors[f"{start}_attn.norm.{norm}.scale"] = torch.zeros(128)
    for block in range(38):
        add(f"single_blocks.{block}.modulation.lin", width, 3 * width)
        add(f"single_blocks.{block}.linear1", width, 7 * width)
        add(f"single_blocks.{block}.linear2", 5 * width, width)
        for norm in ("query_norm", "key_norm"):
            tensors[f"single_blocks.{block}.norm.{norm}.scale"] = torch.zeros(128)
    add("final_layer.adaLN_modulation.1", width, 2 * width)
    add("final_layer.linear", width, 64)
    parts = SimpleNamespace(
        transformer=transformer, text_encoder=None, lora_state_dict=FluxLoraLoaderMixin.lora_state_dict
    )
    lora_weights.read(parts, tensors, torch.empty(0), is_control=True)
    converted = FluxLoraLoaderMixin.lora_state_dict(tensors)
    layers = {key.removeprefix("transformer.").partition(".lora_")[0].removesuffix(".weight") for key in converted}
    assert len(layers) > 500 and "x_embedder" in layers
