"""Weights that are malformed: each command names the file, says what is wrong, and ends with exit code 1."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from models.base import EngineConfig, LoadProgress
from models.loading import hub
from models.loading.pipeline import load_pipeline
from models.loading.specs import DEMO
from server.cli.main import cli
from tests.support.server_process import serving
from tests.unit.loading.test_verify import add

Change = Callable[[Path], Any]
UNET = {"unet": ["diffusers", "UNet2DModel"]}
#: As a clone has it where Git LFS is not installed.
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 23802947360\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo, as it may have come."""
    found = tmp_path / "weights"
    shutil.copytree(DEMO, found, ignore=shutil.ignore_patterns("recipe", "judge", "*.png"))
    return found


def text(path: str, said: str) -> Change:
    """This file says something else."""
    return lambda folder: (folder / path).write_text(said, encoding="utf-8")


def named(**more: Any) -> Change:
    """model_index.json says more."""
    return lambda folder: add(folder / "model_index.json", **more)


def without(path: Path, *names: str) -> None:
    """A JSON file no longer says this."""
    said = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({key: value for key, value in said.items() if key not in names}), encoding="utf-8")


def listed(said: Any, part: str = "transformer") -> Change:
    """The weights of a component stand in an index, which says this."""

    def change(folder: Path) -> None:
        (whole,) = (folder / part).glob("*.safetensors")
        shard = whole.rename(whole.with_name("shard.safetensors"))
        assert shard.is_file()
        (folder / part / f"{whole.name}.index.json").write_text(json.dumps(said), encoding="utf-8")

    return change


def tensors(content: bytes, num_bytes: int | None = None, part: str = "vae") -> Change:
    """The weights of a component begin so, and are zeros up to so many bytes."""

    def change(folder: Path) -> None:
        (path,) = (folder / part).glob("*.safetensors")
        path.write_bytes(content)
        if num_bytes is not None:
            os.truncate(path, num_bytes)

    return change


def cut_off(folder: Path) -> None:
    """The last byte of the transformer did not come."""
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def header(length: int) -> bytes:
    """How a safetensors file begins."""
    return length.to_bytes(8, "little")


def redux(folder: Path) -> None:
    """What lies beside for another endpoint."""
    (folder / "redux").mkdir()
    (folder / "redux" / "config.json").write_text("[]", encoding="utf-8")


#: What is seen before anything is loaded.
SEEN: dict[str, tuple[Change, str]] = {
    "index no JSON": (text("model_index.json", "{"), "model_index.json is not JSON"),
    "index a list": (text("model_index.json", "[]"), "model_index.json is JSON, but not an object"),
    "index nested deeply": (text("model_index.json", "[" * 100_000), "model_index.json is not JSON"),
    "index too large": (
        lambda at: os.truncate(at / "model_index.json", hub.MAX_JSON_BYTES + 1),
        "are allowed for JSON",
    ),
    "a number for a component": (named(vae=5), "names no library and class for vae"),
    "a list too short": (named(vae=["diffusers"]), "vae is ['diffusers'], not a library and a class"),
    "an empty list": (named(vae=[]), "vae is [], not a library and a class"),
    "a number for a class": (named(vae=["diffusers", 5]), "vae is ['diffusers', 5], not a library and a class"),
    "a component left out": (named(vae=[None, None]), "names no library and class for vae"),
    "a component forgotten": (lambda at: without(at / "model_index.json", "vae"), "names no library and class for vae"),
    "an unknown class": (named(vae=["diffusers", "Stranger"]), "only diffusers.AutoencoderKL or"),
    "an unknown library": (named(vae=["somebody", "AutoencoderKL"]), "vae is of somebody.AutoencoderKL"),
    "an unknown component": (named(**UNET), "unet is of diffusers, and is not part"),
    "no folder": (lambda at: shutil.rmtree(at / "vae"), "vae is not there"),
    "no weights": (lambda at: (at / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "vae is not there, or"),
    "configuration no JSON": (text("transformer/config.json", "{"), "transformer/config.json is not JSON"),
    "configuration a list": (
        text("text_encoder/config.json", "[]"),
        "text_encoder/config.json is JSON, but not an object",
    ),
    "configuration no text": (
        lambda at: (at / "vae" / "config.json").write_bytes(b"\xff\xfe"),
        "vae/config.json is not JSON",
    ),
    "scheduler a number": (
        text("scheduler/scheduler_config.json", "5"),
        "scheduler_config.json is JSON, but not an object",
    ),
    "tokenizer no JSON": (text("tokenizer/vocab.json", "{"), "tokenizer/vocab.json is not JSON"),
    "checker no JSON": (text("safety_checker/config.json", "{"), "safety_checker/config.json is not JSON"),
    "Redux a list": (redux, "redux/config.json is JSON, but not an object"),
    "shards in a list": (listed({"metadata": {}, "weight_map": ["shard.safetensors"]}), "is not an index of weights"),
    "no shards": (listed({"metadata": {}, "weight_map": {}}), "is not an index of weights"),
    "an index of nothing": (listed({}), "is not an index of weights"),
    "an index that is a list": (listed([]), "index.json is JSON, but not an object"),
    "a number for a shard": (listed({"metadata": {}, "weight_map": {"x": 5}}), "names 5"),
    "a shard that is not there": (
        listed({"metadata": {}, "weight_map": {"x": "other.safetensors"}}, "text_encoder_2"),
        "names other.safetensors, which is not there",
    ),
    "weights cut off": (cut_off, "transformer/diffusion_pytorch_model.safetensors is not a complete safetensors file"),
    "weights empty": (tensors(b""), "is not a safetensors file, or was cut off"),
    "weights a pointer": (tensors(POINTER), "is not a safetensors file, or was cut off"),
    "header longer than the file": (tensors(header(1000) + b"{}"), "is not a safetensors file, or was cut off"),
    "header longer than is allowed": (
        tensors(header(100_000_001) + b"{}", 100_000_100),
        "has a header of 100000001 bytes, and 100000000 are allowed",
    ),
    "header no JSON": (tensors(header(100) + b"{" * 100), "is not a complete safetensors file"),
    "checker cut off": (tensors(header(1000), part="safety_checker"), "is not a safetensors file, or was cut off"),
}


def narrow(folder: Path) -> None:
    """A text encoder of another pipeline, whole in itself."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=683, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).to(torch.bfloat16).save_pretrained(folder / "text_encoder_2")


#: What shows when it is loaded.
LOADED: dict[str, tuple[Change, str]] = {
    "an index too short": (
        listed({"metadata": {}, "weight_map": {"x_embedder.weight": "shard.safetensors"}}),
        "transformer lacks",
    ),
    "an index without metadata": (
        listed({"weight_map": {"x_embedder.weight": "shard.safetensors"}}),
        "transformer cannot be loaded: KeyError",
    ),
    "other sizes of a transformer": (
        lambda at: add(at / "transformer" / "config.json", joint_attention_dim=64),
        "transformer has other shapes than its configuration for 1 of",
    ),
    "other sizes of a text encoder": (
        lambda at: add(at / "text_encoder" / "config.json", intermediate_size=512),
        "text_encoder has other shapes than its configuration for",
    ),
    "more layers": (lambda at: add(at / "text_encoder_2" / "config.json", num_layers=4), "text_encoder_2 lacks"),
    "a word for a number": (
        lambda at: add(at / "transformer" / "config.json", num_layers="two"),
        "transformer cannot be loaded: TypeError",
    ),
    "a number for a list": (
        lambda at: add(at / "vae" / "config.json", decoder_block_out_channels=5),
        "vae cannot be loaded: ",
    ),
    "sizes that make no model": (
        lambda at: add(at / "text_encoder" / "config.json", num_attention_heads=7),
        "text_encoder cannot be loaded: ",
    ),
    "a tokenizer without words": (text("tokenizer_2/tokenizer.json", "{}"), "tokenizer_2 cannot be loaded: "),
    "words that the encoder has not": (
        lambda at: add(at / "tokenizer" / "vocab.json", unheard=99_999),
        "tokenizer counts to 100000, and its text encoder to 1665",
    ),
    "texts too long": (
        lambda at: add(at / "tokenizer" / "tokenizer_config.json", model_max_length=100),
        "tokenizer_config.json counts to 100, and its text encoder to 77",
    ),
    "parts of other pipelines": (narrow, "text_encoder_2 gives 16 channels, and the transformer takes 128"),
}
ALL = {**SEEN, **LOADED}


def run(command: str, folder: Path, *more: str) -> tuple[int, str]:
    """The exit code of a command, and what it said; an exception that it lets out is the test's."""
    data = ("--data-dir", str(folder.parent / "data"), "--retention-gb", "0.001")
    ports = ("--port", "0", "--tls-port", "0", "--device", "cpu")
    done = CliRunner().invoke(cli, [command, str(folder), *data, *ports, *more])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize("name", SEEN)
def test_it_is_seen_before_anything_is_loaded(folder: Path, name: str) -> None:
    act, words = SEEN[name]
    act(folder)
    reports = list[LoadProgress]()
    with pytest.raises(OSError) as refused:
        load_pipeline(EngineConfig(folder, "", device="cpu", report=reports.append))
    assert words in str(refused.value)
    assert reports == []


@pytest.mark.parametrize("name", SEEN)
def test_the_doctor_sees_it(folder: Path, name: str) -> None:
    act, words = SEEN[name]
    assert run("doctor", folder)[0] == 0
    act(folder)
    code, said = run("doctor", folder)
    assert code == 1
    assert any(words in line for line in said.splitlines() if line.startswith("✗")), said


@pytest.mark.parametrize("name", ALL)
def test_bench_says_it(folder: Path, name: str) -> None:
    act, words = ALL[name]
    act(folder)
    before = torch.get_default_dtype()
    code, said = run("bench", folder, "--sizes", "64x64", "--steps", "1", "--rounds", "1", "--dtype", "bfloat16")
    assert code == 1
    assert words in said
    assert torch.get_default_dtype() == before


@pytest.mark.parametrize("name", ["a list too short", "weights cut off", "an index too short", "a word for a number"])
def test_serve_says_it_and_ends(tmp_path: Path, folder: Path, name: str) -> None:
    act, words = ALL[name]
    act(folder)
    with serving(tmp_path / "data", str(folder), device="cpu") as server:
        assert server.process.wait(60) == 1
    assert words in server.output
    assert "Traceback" not in server.output


def test_names_that_were_published_are_whole(folder: Path) -> None:
    """Files on the hub are older than transformers' present names for the same tensors."""
    from safetensors.torch import load_file, save_file

    path = folder / "text_encoder" / "model.safetensors"
    old = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, path, {"format": "pt"})
    placement = EngineConfig(folder, "", device="cpu", dtype="bfloat16")
    found, expected = (
        load_pipeline(each)[0].text_encoder.state_dict()
        for each in (placement, EngineConfig(DEMO, "", "cpu", "bfloat16"))
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["CLIPTokenizerFast", "T5Tokenizer"])
def test_a_tokenizer_has_two_names(folder: Path, name: str) -> None:
    component = "tokenizer" if "CLIP" in name else "tokenizer_2"
    add(folder / "model_index.json", **{component: ["transformers", name]})
    found, expected = (
        getattr(load_pipeline(EngineConfig(place, "", device="cpu"))[0], component) for place in (folder, DEMO)
    )
    words = "a red apple on a blue table"
    assert found(words).input_ids == expected(words).input_ids


def test_what_nobody_loads_may_lie_beside(folder: Path) -> None:
    """FluxPipeline writes down what IP-Adapters need, whether it has it or not."""
    missing = {"image_encoder": [None, None], "feature_extractor": ["transformers", "CLIPImageProcessor"]}
    add(folder / "model_index.json", **missing)
    pipeline, _ = load_pipeline(EngineConfig(folder, "", device="cpu"))
    assert pipeline.feature_extractor is None
