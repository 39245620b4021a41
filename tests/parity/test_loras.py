"""LoRA weights: applied as by diffusers, bit for bit, and removed without a trace."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from models.base import GenerationFailed, IncompatibleInput
from models.flux.engine import FluxEngine
from models.flux.loras import LoraManager
from models.flux_lora import FluxLoraInput
from server.queue.jobs import Job
from server.worker.running_job import outcome_from_exception
from tests.support import tiny_flux
from tests.support.diffusers_calls import image_of
from tests.support.tiny_flux import RANK, difference, finish_task, write_lora

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write_lora(tmp_path / f"{seed}.safetensors", seed, text=seed == 1) for seed in range(3)]


def request_with(*scales: float, **fields: Any) -> tuple[FluxLoraInput, list[float]]:
    body = {
        "prompt": "a fish",
        "image_size": {"width": 96, "height": 64},
        "num_inference_steps": 3,
        "loras": [{"path": f"http://unused/{n}", "scale": scale} for n, scale in enumerate(scales)],
        **fields,
    }
    return FluxLoraInput.model_validate(body), list(scales)


def inputs(*paths: Path) -> dict[str, Path]:
    return {f"loras.{index}.path": path for index, path in enumerate(paths)}


def generate(engine: FluxEngine, request: FluxLoraInput, *paths: Path) -> Any:
    (image,) = finish_task(engine, engine.start(request, 5, inputs(*paths)))
    return image


def call_diffusers(pipeline: FluxPipeline, request: FluxLoraInput, *paths: Path) -> Any:
    """Generate the request's image with diffusers' own pipeline and these LoRAs."""
    for index, path in enumerate(paths):
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=f"a{index}")
    if paths:
        pipeline.set_adapters([f"a{index}" for index in range(len(paths))], [lora.scale for lora in request.loras])
    return image_of(pipeline, request, (request.image_size.width, request.image_size.height))


def fingerprint(engine: FluxEngine) -> str:
    """Return a hash of every bit of the base weights."""
    digest = hashlib.sha256()
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        for key, weight in sorted(getattr(engine.pipeline, name).state_dict().items()):
            digest.update(key.encode())
            digest.update(weight.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("acceleration", ["none", "regular"])
def test_equals_the_pipeline(files: list[Path], dtype: torch.dtype, acceleration: str) -> None:
    engine = tiny_flux.engine(dtype)
    for scales, paths in (((1.0,), files[:1]), ((0.5,), files[1:2]), ((0.7, 1.3), files[:2])):
        request, _ = request_with(*scales, acceleration=acceleration)
        expected = call_diffusers(tiny_flux.pipeline(dtype), request, *paths)
        assert difference(generate(engine, request, *paths), expected) == 0


def test_the_base_weights_never_change(files: list[Path]) -> None:
    engine = tiny_flux.engine(torch.bfloat16)
    before, (plain, _) = fingerprint(engine), request_with()
    first = generate(engine, plain)
    request, _ = request_with(1.5)
    changed = engine.start(request, 5, inputs(files[0]))
    unchanged = engine.start(plain, 5)
    # The two tasks take turns, step by step.
    for _ in range(3):
        engine.advance(changed)
        engine.advance(unchanged)
    assert difference(finish_task(engine, unchanged)[0], first) == 0
    assert difference(finish_task(engine, changed)[0], first) > 0
    assert difference(generate(engine, plain), first) == 0
    assert fingerprint(engine) == before
    assert all("lora" not in name for name, _ in engine.pipeline.transformer.named_modules())


def test_interleaved_tasks_with_different_loras(files: list[Path]) -> None:
    engine = tiny_flux.engine()
    requests = [(request_with(1.0)[0], files[0]), (request_with(0.4)[0], files[1]), (request_with(2.0)[0], files[0])]
    alone = [generate(tiny_flux.engine(), request, path) for request, path in requests]
    tasks = [engine.start(request, 5, inputs(path)) for request, path in requests]
    for _ in range(3):
        for task in tasks:
            engine.advance(task)
    for task, expected in zip(tasks, alone, strict=True):
        assert difference(finish_task(engine, task)[0], expected) == 0


def test_only_tasks_with_the_same_loras_share_a_forward(files: list[Path]) -> None:
    engine = tiny_flux.engine()
    request, _ = request_with(1.0, acceleration="regular")
    leader, same, other, plain = (
        engine.start(request, 1, inputs(files[0])),
        engine.start(request, 2, inputs(files[0])),
        engine.start(request, 3, inputs(files[1])),
        engine.start(request_with(acceleration="regular")[0], 4),
    )
    assert engine.advance(leader, [same, other, plain]) == [leader, same]


def test_the_least_recently_used_loras_are_evicted(tmp_path: Path) -> None:
    engine = tiny_flux.engine()
    request, _ = request_with(1.0, num_inference_steps=1)
    paths = [write_lora(tmp_path / f"{seed}.safetensors", seed) for seed in range(5)]
    engine.loras = LoraManager(engine.pipeline, kept_bytes=3 * paths[0].stat().st_size)
    for path in paths:
        generate(engine, request, path)
    assert engine.loras.names == [path.stem for path in paths[-3:]]
    again = generate(engine, request, paths[0])
    assert difference(again, generate(tiny_flux.engine(), request, paths[0])) == 0


def test_a_file_in_fp8_counts_as_it_is_kept(tmp_path: Path) -> None:
    engine = tiny_flux.engine()
    request, _ = request_with(1.0, num_inference_steps=1)
    paths = [write_lora(tmp_path / f"{seed}.safetensors", seed) for seed in range(3)]
    engine.loras = LoraManager(engine.pipeline, kept_bytes=2 * paths[0].stat().st_size)
    for path in paths:
        save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}, path)
        generate(engine, request, path)
    assert engine.loras.names == [path.stem for path in paths[-2:]]


def test_loras_are_evicted_even_if_another_does_not_fit(tmp_path: Path, files: list[Path]) -> None:
    engine = tiny_flux.engine()
    engine.loras = LoraManager(engine.pipeline, kept_bytes=3 * files[0].stat().st_size)
    bad = write_lora(tmp_path / "bad.safetensors", 1, width=48)
    for seed in range(4):
        good = [write_lora(tmp_path / f"{seed}-{n}.safetensors", 10 * seed + n) for n in range(2)]
        with pytest.raises(GenerationFailed):
            generate(engine, request_with(1.0, 1.0, 1.0)[0], *good, bad)
        assert len(engine.loras.names) <= 3


def test_idle_loras_are_evicted_when_memory_runs_out(files: list[Path]) -> None:
    engine = tiny_flux.engine()
    generate(engine, request_with(1.0)[0], files[0])
    generate(engine, request_with(1.0)[0], files[1])
    task = engine.start(request_with(1.0, acceleration="none")[0], 5, inputs(files[1]))
    engine._step_alone(task)
    assert engine.loras and engine.loras.names == [files[1].stem]


def test_the_same_lora_twice_adds_both_scales(files: list[Path]) -> None:
    engine = tiny_flux.engine()
    twice = generate(engine, request_with(0.5, 0.5)[0], files[0], files[0])
    assert difference(twice, generate(engine, request_with(1.0)[0], files[0])) == 0


def test_scale_zero_equals_the_base(files: list[Path]) -> None:
    engine = tiny_flux.engine()
    assert difference(generate(engine, request_with(0.0)[0], files[0]), generate(engine, request_with()[0])) == 0


def write_changed(path: Path, target: Path, **changes: torch.Tensor) -> Path:
    save_file({**load_file(path), **changes}, target)
    return target


def test_loras_that_do_not_fit_are_refused_and_change_nothing(tmp_path: Path, files: list[Path]) -> None:
    engine = tiny_flux.engine()
    before = fingerprint(engine)
    good = generate(engine, request_with(1.0)[0], files[0])
    norm = {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(16)}
    hidden = {"transformer.proj_out.weight": torch.zeros(16, 32)}
    wider = torch.randn(RANK, 64)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    bad = {
        "alpha is not a single number": write_changed(
            files[0], tmp_path / "e.safetensors", **{f"{layer}.alpha": torch.ones(3)}
        ),
        "which do not form a pair": write_changed(
            files[0], tmp_path / "f.safetensors", **{f"{layer}.lora_A.weight": torch.ones(RANK + 1, 32)}
        ),
        "has one matrix where a LoRA has two": write_changed(
            files[0], tmp_path / "g.safetensors", **{"transformer.proj_out.lora_B.weight": torch.ones(16, RANK)}
        ),
        "default.weight is not one of a LoRA": write_changed(
            files[0], tmp_path / "h.safetensors", **{f"{layer}.lora_A.default.weight": torch.ones(RANK, 32)}
        ),
        "no linear layer transformer_blocks.0.attn.norm_q": write_changed(
            files[0],
            tmp_path / "i.safetensors",
            **{f"{layer.replace('to_q', 'norm_q')}.lora_A.weight": torch.ones(RANK, 16)},
        ),
        "weight is empty": write_changed(
            files[0],
            tmp_path / "j.safetensors",
            **{f"{layer}.lora_A.weight": torch.ones(0, 32), f"{layer}.lora_B.weight": torch.ones(32, 0)},
        ),
        "features": write_changed(
            files[0], tmp_path / "a.safetensors", **{"transformer.x_embedder.lora_A.weight": wider}
        ),
        "not one of a LoRA": write_changed(files[0], tmp_path / "b.safetensors", **norm),
        "base weights": write_changed(files[0], tmp_path / "c.safetensors", **hidden),
        "": write_lora(tmp_path / "d.safetensors", 1, width=48),
    }
    for message, path in bad.items():
        with pytest.raises(GenerationFailed, match=rf"do not fit this model: .*{message}"):
            generate(engine, request_with(1.0, 1.0)[0], files[0], path)
        assert fingerprint(engine) == before
        assert difference(generate(engine, request_with(1.0)[0], files[0]), good) == 0


@pytest.mark.parametrize("alpha", [-1.0, -math.inf, math.inf, math.nan])
def test_an_alpha_that_diffusers_would_never_end_with_is_refused(tmp_path: Path, alpha: float) -> None:
    layer = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{layer}.lora_down.weight": torch.ones(RANK, 32), f"{layer}.lora_up.weight": torch.ones(32, RANK)}
    save_file({**tensors, f"{layer}.alpha": torch.tensor(alpha)}, tmp_path / "a.safetensors")
    with pytest.raises(IncompatibleInput, match="alpha is not a single number from 0"):
        generate(tiny_flux.engine(), request_with(1.0)[0], tmp_path / "a.safetensors")


def test_a_lora_cannot_overwrite_that_of_another_client(tmp_path: Path, files: list[Path]) -> None:
    engine = tiny_flux.engine()
    request, both = request_with(1.0)[0], request_with(1.0, 1.0)[0]
    expected = generate(engine, request, files[1])
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    victim = {f"{layer}.lora_A.{files[1].stem}.weight": torch.ones(RANK, 16)}
    hostile = write_changed(files[1], tmp_path / "hostile.safetensors", **victim)
    for attack, paths in ((request, [hostile]), (both, [files[1], hostile])):
        with pytest.raises(IncompatibleInput, match="is not one of a LoRA's matrices"):
            generate(engine, attack, *paths)
    assert difference(generate(engine, request, files[1]), expected) == 0


def test_a_lora_that_fails_does_not_change_other_images(tmp_path: Path, files: list[Path]) -> None:
    """Refuse a LoRA of which only some layers fit, among them layers for which the running task has no LoRA."""
    flat = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(16)}
    bad = write_changed(write_lora(tmp_path / "whole.safetensors", 9, text=True), tmp_path / "bad.safetensors", **flat)
    few = {key: weight for key, weight in load_file(files[0]).items() if "attn" in key}
    save_file(few, tmp_path / "few.safetensors")
    engine, alone = tiny_flux.engine(), tiny_flux.engine()
    expected = generate(alone, request_with(1.0)[0], tmp_path / "few.safetensors")
    running = engine.start(request_with(1.0)[0], 5, inputs(tmp_path / "few.safetensors"))
    engine.advance(running)
    with pytest.raises(GenerationFailed, match="do not fit this model"):
        generate(engine, request_with(1.0)[0], bad)
    (image,) = finish_task(engine, running)
    assert difference(image, expected) == 0
    assert engine.loras and engine.loras.names == ["few"]


def test_metadata_in_the_file_is_ignored(tmp_path: Path, files: list[Path]) -> None:
    """Ignore a file's metadata, which could choose how layers are set up, or hold an expression that never ends."""
    config = {"r": 1, "lora_alpha": 99, "target_modules": ["to_q"], "init_lora_weights": "pissa"}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    save_file(load_file(files[0]), tmp_path / "told.safetensors", metadata=metadata)
    engine = tiny_flux.engine()
    plain = generate(engine, request_with(1.0)[0], files[0])
    assert difference(generate(engine, request_with(1.0)[0], tmp_path / "told.safetensors"), plain) == 0


@pytest.mark.parametrize("offered", ["none", "regular"])
def test_no_higher_tier_than_the_operator_offers(files: list[Path], offered: str) -> None:
    engine = tiny_flux.engine()
    engine.tiers = [tier for tier in engine.tiers if tier.name in ("none", offered)]
    task = engine.start(request_with(1.0, acceleration="regular")[0], 1, inputs(files[0]))
    assert task.acceleration == offered


def test_a_file_may_be_deleted_once_it_is_loaded(tmp_path: Path, files: list[Path]) -> None:
    engine = tiny_flux.engine()
    copy = tmp_path / "copy.safetensors"
    shutil.copy(files[0], copy)
    first = generate(engine, request_with(1.0)[0], copy)
    copy.unlink()
    assert difference(generate(engine, request_with(1.0)[0], copy), first) == 0


def test_the_error_names_the_lora_and_the_reason() -> None:
    """Report LoRA weights that do not fit as the client's error in this field, not as a failure of the server."""
    error = IncompatibleInput(("loras", 1, "path"), "These LoRA weights do not fit this model: too wide")
    outcome = outcome_from_exception(error, cast(Job, None))
    assert outcome.status == 422
    (entry,) = json.loads(outcome.body)["detail"]
    assert (entry["loc"], entry["msg"]) == (["body", "loras", 1, "path"], str(error))
