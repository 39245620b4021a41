"""Tests of malformed weights: each command names the file and the problem, and exits with code 1."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from models.base import EngineConfig, LoadProgress
from models.benchmark.processes import ChildFailed
from models.loading import hub
from models.loading.pipeline import load_pipeline
from models.loading.specs import DEMO
from server.cli.main import cli
from tests.support.server_process import serving
from tests.unit.loading.test_verify import add_entries

Change = Callable[[Path], Any]
UNET = {"unet": ["diffusers", "UNet2DModel"]}
#: A pointer of Git LFS, as in a clone where Git LFS is not installed.
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 23802947360\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a copy of the demo's weights, for a test to damage."""
    found = tmp_path / "weights"
    shutil.copytree(DEMO, found, ignore=shutil.ignore_patterns("recipe", "judge", "*.png"))
    return found


def overwrite(path: str, content: str) -> Change:
    """Return a change that overwrites this file."""
    return lambda directory: (directory / path).write_text(content, encoding="utf-8")


def add_to_index(**more: Any) -> Change:
    """Return a change that adds entries to model_index.json."""
    return lambda directory: add_entries(directory / "model_index.json", **more)


def remove_names(path: Path, *names: str) -> None:
    """Remove these names from a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in names}), encoding="utf-8")


def put_behind_index(content: Any, part: str = "transformer") -> Change:
    """Return a change that renames a component's weights to a shard, and writes an index with this content."""

    def change(directory: Path) -> None:
        (weights,) = (directory / part).glob("*.safetensors")
        shard = weights.rename(weights.with_name("shard.safetensors"))
        assert shard.is_file()
        (directory / part / f"{weights.name}.index.json").write_text(json.dumps(content), encoding="utf-8")

    return change


def replace_weights(content: bytes, num_bytes: int | None = None, part: str = "vae") -> Change:
    """Return a change that replaces a component's weights with this content, padded with zeros to `num_bytes`."""

    def change(directory: Path) -> None:
        (path,) = (directory / part).glob("*.safetensors")
        path.write_bytes(content)
        if num_bytes is not None:
            os.truncate(path, num_bytes)

    return change


def truncate_transformer(directory: Path) -> None:
    """Remove the last byte of the transformer's weights."""
    path = directory / "transformer" / "diffusion_pytorch_model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def header(length: int) -> bytes:
    """Return the start of a safetensors file: the length of the header."""
    return length.to_bytes(8, "little")


#: Problems that are found before anything is loaded.
FOUND_BEFORE_LOADING: dict[str, tuple[Change, str]] = {
    "index no JSON": (overwrite("model_index.json", "{"), "model_index.json is not JSON"),
    "index a list": (overwrite("model_index.json", "[]"), "model_index.json is JSON, but not an object"),
    "index nested deeply": (overwrite("model_index.json", "[" * 100_000), "model_index.json is not JSON"),
    "index too large": (
        lambda root: os.truncate(root / "model_index.json", hub.MAX_JSON_BYTES + 1),
        "are allowed for JSON",
    ),
    "a number for a component": (add_to_index(vae=5), "names no library and class for vae"),
    "a list too short": (add_to_index(vae=["diffusers"]), "vae is ['diffusers'], not a library and a class"),
    "an empty list": (add_to_index(vae=[]), "vae is [], not a library and a class"),
    "a number for a class": (add_to_index(vae=["diffusers", 5]), "vae is ['diffusers', 5], not a library and a class"),
    "a component left out": (add_to_index(vae=[None, None]), "names no library and class for vae"),
    "a component missing": (
        lambda root: remove_names(root / "model_index.json", "vae"),
        "names no library and class for vae",
    ),
    "an unknown class": (add_to_index(vae=["diffusers", "Stranger"]), "only diffusers.AutoencoderKL or"),
    "an unknown library": (add_to_index(vae=["someone", "AutoencoderKL"]), "vae is of someone.AutoencoderKL"),
    "an unknown component": (add_to_index(**UNET), "unet is of diffusers, and is not part"),
    "no directory": (lambda root: shutil.rmtree(root / "vae"), "vae is missing"),
    "no weights": (
        lambda root: (root / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
        "vae is missing, or",
    ),
    "configuration no JSON": (overwrite("transformer/config.json", "{"), "transformer/config.json is not JSON"),
    "configuration a list": (
        overwrite("text_encoder/config.json", "[]"),
        "text_encoder/config.json is JSON, but not an object",
    ),
    "configuration no text": (
        lambda root: (root / "vae" / "config.json").write_bytes(b"\xff\xfe"),
        "vae/config.json is not JSON",
    ),
    "scheduler a number": (
        overwrite("scheduler/scheduler_config.json", "5"),
        "scheduler_config.json is JSON, but not an object",
    ),
    "tokenizer no JSON": (overwrite("tokenizer/vocab.json", "{"), "tokenizer/vocab.json is not JSON"),
    "checker no JSON": (overwrite("safety_checker/config.json", "{"), "safety_checker/config.json is not JSON"),
    "Redux a list": (
        overwrite("redux/image_encoder/config.json", "[]"),
        "redux/image_encoder/config.json is JSON, but not an object",
    ),
    "shards in a list": (
        put_behind_index({"metadata": {}, "weight_map": ["shard.safetensors"]}),
        "is not an index of weights",
    ),
    "no shards": (put_behind_index({"metadata": {}, "weight_map": {}}), "is not an index of weights"),
    "an index of nothing": (put_behind_index({}), "is not an index of weights"),
    "an index that is a list": (put_behind_index([]), "index.json is JSON, but not an object"),
    "a number for a shard": (put_behind_index({"metadata": {}, "weight_map": {"x": 5}}), "names 5"),
    "a shard that is not there": (
        put_behind_index({"metadata": {}, "weight_map": {"x": "other.safetensors"}}, "text_encoder_2"),
        "names other.safetensors, which is missing",
    ),
    "weights cut off": (
        truncate_transformer,
        "transformer/diffusion_pytorch_model.safetensors is not a complete safetensors file",
    ),
    "weights empty": (replace_weights(b""), "is not a safetensors file, or was cut off"),
    "weights a pointer": (replace_weights(POINTER), "is not a safetensors file, or was cut off"),
    "header longer than the file": (replace_weights(header(1000) + b"{}"), "is not a safetensors file, or was cut off"),
    "header longer than is allowed": (
        replace_weights(header(100_000_001) + b"{}", 100_000_100),
        "has a header of 100000001 bytes, but only 100000000 are allowed",
    ),
    "header no JSON": (replace_weights(header(100) + b"{" * 100), "is not a complete safetensors file"),
    "checker cut off": (
        replace_weights(header(1000), part="safety_checker"),
        "is not a safetensors file, or was cut off",
    ),
}


def replace_text_encoder(directory: Path) -> None:
    """Replace a text encoder with a valid one of another pipeline."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=683, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).to(torch.bfloat16).save_pretrained(directory / "text_encoder_2")


#: Problems that are found during loading.
FOUND_DURING_LOADING: dict[str, tuple[Change, str]] = {
    "an index too short": (
        put_behind_index({"metadata": {}, "weight_map": {"x_embedder.weight": "shard.safetensors"}}),
        "transformer lacks",
    ),
    "an index without metadata": (
        put_behind_index({"weight_map": {"x_embedder.weight": "shard.safetensors"}}),
        "transformer cannot be loaded: KeyError",
    ),
    "other sizes of a transformer": (
        lambda root: add_entries(root / "transformer" / "config.json", joint_attention_dim=64),
        "transformer has other shapes than its config.json for 1 of",
    ),
    "other sizes of a text encoder": (
        lambda root: add_entries(root / "text_encoder" / "config.json", intermediate_size=512),
        "text_encoder has other shapes than its config.json for",
    ),
    "more layers": (
        lambda root: add_entries(root / "text_encoder_2" / "config.json", num_layers=4),
        "text_encoder_2 lacks",
    ),
    "a word for a number": (
        lambda root: add_entries(root / "transformer" / "config.json", num_layers="two"),
        "transformer cannot be loaded: TypeError",
    ),
    "a number for a list": (
        lambda root: add_entries(root / "vae" / "config.json", decoder_block_out_channels=5),
        "vae cannot be loaded: ",
    ),
    "sizes that make no model": (
        lambda root: add_entries(root / "text_encoder" / "config.json", num_attention_heads=7),
        "text_encoder cannot be loaded: ",
    ),
    "a tokenizer without words": (overwrite("tokenizer_2/tokenizer.json", "{}"), "tokenizer_2 cannot be loaded: "),
    "tokens that the encoder lacks": (
        lambda root: add_entries(root / "tokenizer" / "vocab.json", unheard=99_999),
        "tokenizer has 100000 token ids, but its text encoder has 1665",
    ),
    "texts too long": (
        lambda root: add_entries(root / "tokenizer" / "tokenizer_config.json", model_max_length=100),
        "tokenizer_config.json has 100 positions, but its text encoder has 77",
    ),
    "parts of other pipelines": (
        replace_text_encoder,
        "text_encoder_2 gives 16 channels, but the transformer takes 128",
    ),
}
ALL = {**FOUND_BEFORE_LOADING, **FOUND_DURING_LOADING}


def run(command: str, directory: Path, *more: str) -> tuple[int, str]:
    """Run a command, and return its exit code and output. An exception from the command fails the test."""
    data = ("--data-dir", str(directory.parent / "data"), "--retention-gb", "0.001")
    ports = ("--port", "0", "--tls-port", "0", "--device", "cpu")
    result = CliRunner().invoke(cli, [command, str(directory), *data, *ports, *more])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("name", FOUND_BEFORE_LOADING)
def test_problems_are_found_before_anything_is_loaded(directory: Path, name: str) -> None:
    damage, message = FOUND_BEFORE_LOADING[name]
    damage(directory)
    reports = list[LoadProgress]()
    with pytest.raises(OSError) as error:
        load_pipeline(EngineConfig(directory, "", device="cpu", report=reports.append))
    assert message in str(error.value)
    assert reports == []


@pytest.mark.parametrize("name", FOUND_BEFORE_LOADING)
def test_doctor_reports_the_problem(directory: Path, name: str) -> None:
    damage, message = FOUND_BEFORE_LOADING[name]
    assert run("doctor", directory)[0] == 0
    damage(directory)
    code, output = run("doctor", directory)
    assert code == 1
    assert any(message in line for line in output.splitlines() if line.startswith("✗")), output


def run_here(function: Callable[[Any], Iterator[Any]], argument: Any) -> Iterator[Any]:
    """Call a function as `run_in_child` does, but in this process."""
    try:
        yield from function(argument)
    except OSError as error:
        raise ChildFailed(str(error)) from error


@pytest.mark.parametrize("name", ALL)
def test_bench_reports_the_problem(directory: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Measure in this process, because a new one would import PyTorch again.
    monkeypatch.setattr("server.cli.bench.run_in_child", run_here)
    damage, message = ALL[name]
    damage(directory)
    before = torch.get_default_dtype()
    code, output = run("bench", directory, "--sizes", "64x64", "--steps", "1", "--rounds", "1", "--dtype", "bfloat16")
    assert code == 1
    assert message in output
    assert torch.get_default_dtype() == before


@pytest.mark.parametrize(
    "name",
    [
        "a list too short",
        *(
            pytest.param(name, marks=pytest.mark.thorough)
            for name in ("weights cut off", "an index too short", "a word for a number")
        ),
    ],
)
def test_serve_reports_the_problem_and_exits(tmp_path: Path, directory: Path, name: str) -> None:
    damage, message = ALL[name]
    damage(directory)
    with serving(tmp_path / "data", str(directory), device="cpu") as server:
        assert server.process.wait(60) == 1
    assert message in server.output
    assert "Traceback" not in server.output


def test_published_tensor_names_are_accepted(directory: Path) -> None:
    """Files on the hub are older than the names that transformers now uses for the same tensors."""
    from safetensors.torch import load_file, save_file

    path = directory / "text_encoder" / "model.safetensors"
    old = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, path, {"format": "pt"})
    config = EngineConfig(directory, "", device="cpu", dtype="bfloat16")
    found, expected = (
        load_pipeline(each)[0].text_encoder.state_dict() for each in (config, EngineConfig(DEMO, "", "cpu", "bfloat16"))
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["CLIPTokenizerFast", "T5Tokenizer"])
def test_both_class_names_of_a_tokenizer_are_accepted(directory: Path, name: str) -> None:
    component = "tokenizer" if "CLIP" in name else "tokenizer_2"
    add_entries(directory / "model_index.json", **{component: ["transformers", name]})
    found, expected = (
        getattr(load_pipeline(EngineConfig(path, "", device="cpu"))[0], component) for path in (directory, DEMO)
    )
    prompt = "a red apple on a blue table"
    assert found(prompt).input_ids == expected(prompt).input_ids


def test_unused_components_may_be_listed(directory: Path) -> None:
    """FluxPipeline lists the components that IP-Adapters need, even if it lacks them."""
    missing = {"image_encoder": [None, None], "feature_extractor": ["transformers", "CLIPImageProcessor"]}
    add_entries(directory / "model_index.json", **missing)
    pipeline, _ = load_pipeline(EngineConfig(directory, "", device="cpu"))
    assert pipeline.feature_extractor is None
