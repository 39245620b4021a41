"""Tests of untrusted weights: no code in them runs, and no file outside them is read."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from models.base import EngineConfig, GenerationFailed
from models.flux import safety_checker
from models.loading import hub, pipeline, specs, verify
from models.loading.pipeline import load_pipeline
from models.loading.specs import DEMO
from server.cli import doctor
from server.settings import Settings
from tests.support.forking import run_flux_server
from tests.support.network_programs import cached


class Bomb:
    """Object that creates a directory when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Return the path that exists once code from the weights has run."""
    return tmp_path / "it ran"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a copy of the demo's weights, for a test to change."""
    copy = tmp_path / "weights"
    shutil.copytree(DEMO, copy, ignore=shutil.ignore_patterns("recipe", "judge", "*.png"))
    return copy


def engine_config(directory: Path) -> EngineConfig:
    return EngineConfig(directory, safety_checker="", device="cpu")


def add_entries(path: Path, **more: Any) -> None:
    """Add entries to a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **more}), encoding="utf-8")


def sharded(component: Path, shard: str) -> None:
    """Replace the weights of a component with an index that names only this file."""
    (weights,) = component.glob("*.safetensors")
    weights.unlink()
    add_entries(component / f"{weights.name}.index.json", metadata={}, weight_map={"x": shard})


def link(path: Path, target: Path) -> None:
    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    path.symlink_to(target)


#: The entries by which transformers finds code.
AUTO_MAP = dict.fromkeys(
    ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor", "AutoModelForImageClassification"),
    "stranger.Stranger",
)

CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a link to a file": (
        lambda directory: link(directory / "vae" / "config.json", Path("/etc/hostname")),
        "outside the directory",
    ),
    "a link to a directory": (lambda directory: link(directory / "vae", DEMO / "vae"), "outside the directory"),
    "a link to its parent": (lambda directory: link(directory / "up", Path("..")), "outside the directory"),
    "a link to nothing": (
        lambda directory: link(directory / "vae" / "config.json", Path("/nowhere")),
        "outside the directory",
    ),
    "a link in its checker": (
        lambda directory: link(directory / "safety_checker" / "x", Path("/etc")),
        "outside the directory",
    ),
    "a pickled shard": (lambda directory: sharded(directory / "transformer", "x.bin"), "'x.bin'"),
    "a shard elsewhere": (
        lambda directory: sharded(directory / "text_encoder", "../../x.safetensors"),
        "only safetensors",
    ),
    "a shard anywhere": (lambda directory: sharded(directory / "vae", "/x.safetensors"), "only safetensors"),
    "a pickled shard of the checker": (lambda directory: sharded(directory / "safety_checker", "x.pt"), "'x.pt'"),
    "a shard without a name": (
        lambda directory: add_entries(directory / "x.safetensors.index.json", weight_map={"x": 5}),
        "5",
    ),
    "no index": (
        lambda directory: add_entries(directory / "x.safetensors.index.json", weight_map=[]),
        "not an index of weights",
    ),
    "an adapter": (
        lambda directory: add_entries(
            directory / "text_encoder" / "adapter_config.json", base_model_name_or_path=str(DEMO)
        ),
        "an adapter is not part",
    ),
    "a pipe": (lambda directory: os.mkfifo(directory / "vae" / "x.json"), "neither a file nor a directory"),
    "a link in a circle": (
        lambda directory: link(directory / "vae" / "x", Path("x")),
        "neither a file nor a directory",
    ),
    "code": (lambda directory: (directory / "vae" / "stranger.py").touch(), "stranger.py is code"),
    "code that is never loaded": (lambda directory: (directory / "pipeline.py").touch(), "pipeline.py is code"),
    "code of its checker": (lambda directory: (directory / "safety_checker" / "x.py").touch(), "x.py is code"),
    "attention from the hub": (
        lambda directory: add_entries(directory / "text_encoder" / "config.json", attn_implementation="someone/kernel"),
        "names code under attn_implementation",
    ),
    "code of a part": (
        lambda directory: add_entries(directory / "text_encoder" / "config.json", text_config={"auto_map": AUTO_MAP}),
        "names code under auto_map",
    ),
    "a class that looks for code": (
        lambda directory: add_entries(directory / "model_index.json", text_encoder=["transformers", "AutoModel"]),
        "only transformers.CLIPTextModel",
    ),
    "another class": (
        lambda directory: add_entries(directory / "model_index.json", vae=["diffusers", "UNet2DModel"]),
        "only diffusers.AutoencoderKL or diffusers.AutoencoderTiny",
    ),
    "another part": (
        lambda directory: add_entries(directory / "model_index.json", unet=["diffusers", "UNet2DModel"]),
        "unet is of diffusers, and is not part",
    ),
    "a custom pipeline class": (
        lambda directory: add_entries(directory / "model_index.json", _class_name=["x", "X"]),
        "is of x",
    ),
    "a component elsewhere": (
        lambda directory: add_entries(directory / "model_index.json", **{"../x": ["diffusers", "AutoencoderTiny"]}),
        "not a component's name",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_untrusted_content_is_rejected_before_anything_is_loaded(directory: Path, name: str) -> None:
    change, message = CHANGES[name]
    change(directory)
    with pytest.raises(OSError, match=message):
        load_pipeline(engine_config(directory))


def test_doctor_reports_the_problem(directory: Path, tmp_path: Path) -> None:
    link(directory / "vae" / "config.json", Path("/etc/hostname"))
    settings = Settings(data_dir=tmp_path / "data", weights=(str(directory),), device="cpu")
    assert any("outside the directory" in finding.message for finding in doctor.run_checks(settings) if not finding.ok)


def test_links_within_the_weights_are_followed(directory: Path) -> None:
    (directory / "vae").rename(directory / "other")
    (directory / "vae").symlink_to("other")
    verify.verify(directory)


def test_the_hubs_cache_is_loaded_directly(tmp_path: Path) -> None:
    """Files in the cache are links to its blobs, and the path to the cache may contain a link too.

    Links to directories among the blobs, and links to the blobs of other repositories, are rejected.
    """
    snapshot = cached(tmp_path / "real", "someone/weights", DEMO)
    (tmp_path / "home").symlink_to("real")
    path = specs.parse_spec(str(tmp_path / "home" / snapshot.relative_to(tmp_path / "real")))
    assert isinstance(path, Path)
    assert (path / "vae" / "config.json").is_symlink()
    pipeline, _ = load_pipeline(engine_config(path))
    assert hub.components(path) == list(hub.read_model_index(DEMO))
    assert pipeline.vae is not None
    # The checker, a directory within the snapshot, is loaded separately.
    assert safety_checker.load(engine_config(path)).is_unsafe([Image.new("RGB", (64, 64))]) == [False]
    other = cached(tmp_path / "real", "someone/else", DEMO / "vae")
    link(snapshot / "vae" / "config.json", (other / "config.json").resolve())
    with pytest.raises(OSError, match="outside the directory"):
        load_pipeline(engine_config(path))
    hidden = snapshot.parents[1] / "blobs" / "hidden"
    hidden.mkdir()
    (hidden / "stranger.py").touch()
    link(snapshot / "vae", hidden)
    with pytest.raises(OSError, match="outside the directory"):
        load_pipeline(engine_config(path))


def test_a_pickle_named_safetensors_is_not_unpickled(directory: Path, mark: Path) -> None:
    for path in directory.glob("*/*.safetensors"):
        path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(OSError, match=r"weights cannot be read|safetensors"):
        load_pipeline(engine_config(directory))
    with pytest.raises(GenerationFailed):
        safety_checker.load(engine_config(directory)).is_unsafe([])
    assert not mark.exists()
    pickle.loads((directory / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert mark.exists()


@pytest.fixture
def weights_with_code(directory: Path, mark: Path) -> Callable[[str], Path]:
    """Return a function that adds code to a component.

    The configurations of the component name the code, and model_index.json asks for it.
    """

    def add_code(name: str) -> Path:
        (directory / name / "stranger.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n", encoding="utf-8")
        for path in (directory / name).glob("*config.json"):
            add_entries(path, auto_map=AUTO_MAP, model_type="stranger", image_processor_type="Stranger")
        if name != "safety_checker":
            kind = "AutoTokenizer" if "tokenizer" in name else "AutoModel"
            add_entries(directory / "model_index.json", **{name: ["transformers", kind]})
        return directory

    return add_code


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "tokenizer", "transformer", "vae", "scheduler"])
def test_code_in_the_weights_does_not_run(weights_with_code: Callable[[str], Path], mark: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"names code|is code"):
        load_pipeline(engine_config(weights_with_code(name)))
    assert not mark.exists()


@pytest.mark.parametrize("command", ["bench", "doctor", "serve"])
def test_no_command_runs_the_code_or_asks_a_question(
    weights_with_code: Callable[[str], Path], mark: Path, tmp_path: Path, command: str
) -> None:
    """The input would answer any question with yes."""
    settings = ("--device", "cpu", "--port", "0", "--tls-port", "0", "--data-dir", str(tmp_path / "data"))
    result = run_flux_server(command, str(weights_with_code("text_encoder")), *settings, text="y\n" * 20, seconds=100)
    output = result.stdout + result.stderr
    assert result.returncode == 1, output
    assert "names code under auto_map" in output
    assert "[y/N]" not in output
    assert "Traceback" not in output
    assert not mark.exists()


def test_code_of_a_checker_does_not_run_and_no_question_is_asked(
    weights_with_code: Callable[[str], Path], mark: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checker = safety_checker.load(engine_config(weights_with_code("safety_checker")))
    assert isinstance(checker, safety_checker.Unavailable)
    assert re.search(r"names code|is code", checker.reason)
    assert not mark.exists()
    assert "[y/N]" not in capfd.readouterr().out


def test_a_token_named_like_code_is_accepted(directory: Path) -> None:
    vocabulary = json.loads((directory / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    add_entries(directory / "tokenizer" / "vocab.json", auto_map=max(vocabulary.values()))
    verify.verify_pipeline(directory, pipeline.NON_PIPELINE_COMPONENTS)
