"""Weights from strangers: nothing in them runs, and nothing outside of them is read."""

import json
import os
import pickle
import shutil
import subprocess
import sys
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
from tests.support.network_programs import cached
from tests.support.server_process import ROOT


class Bomb:
    """Whoever unpickles it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What is there once code of the weights ran."""
    return tmp_path / "it ran"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo, as somebody else may have changed it."""
    found = tmp_path / "weights"
    shutil.copytree(DEMO, found, ignore=shutil.ignore_patterns("recipe", "judge", "*.png"))
    return found


def placement(folder: Path) -> EngineConfig:
    return EngineConfig(folder, safety_checker="", device="cpu")


def add(path: Path, **more: Any) -> None:
    """Say more in a JSON file."""
    said = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**said, **more}), encoding="utf-8")


def sharded(component: Path, shard: str) -> None:
    """All weights of a component are said to lie in this file."""
    (whole,) = component.glob("*.safetensors")
    whole.unlink()
    add(component / f"{whole.name}.index.json", metadata={}, weight_map={"x": shard})


def link(path: Path, target: Path) -> None:
    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    path.symlink_to(target)


#: What transformers finds code by.
AUTO_MAP = dict.fromkeys(
    ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor", "AutoModelForImageClassification"),
    "stranger.Stranger",
)

CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a link to a file": (lambda folder: link(folder / "vae" / "config.json", Path("/etc/hostname")), "leads out"),
    "a link to a folder": (lambda folder: link(folder / "vae", DEMO / "vae"), "leads out"),
    "a link to its parent": (lambda folder: link(folder / "up", Path("..")), "leads out"),
    "a link to nothing": (lambda folder: link(folder / "vae" / "config.json", Path("/nowhere")), "leads out"),
    "a link in its checker": (lambda folder: link(folder / "safety_checker" / "x", Path("/etc")), "leads out"),
    "a pickled shard": (lambda folder: sharded(folder / "transformer", "x.bin"), "'x.bin'"),
    "a shard elsewhere": (lambda folder: sharded(folder / "text_encoder", "../../x.safetensors"), "only safetensors"),
    "a shard anywhere": (lambda folder: sharded(folder / "vae", "/x.safetensors"), "only safetensors"),
    "a pickled shard of the checker": (lambda folder: sharded(folder / "safety_checker", "x.pt"), "'x.pt'"),
    "a shard without a name": (lambda folder: add(folder / "x.safetensors.index.json", weight_map={"x": 5}), "5"),
    "no index": (lambda folder: add(folder / "x.safetensors.index.json", weight_map=[]), "not an index of weights"),
    "an adapter": (
        lambda folder: add(folder / "text_encoder" / "adapter_config.json", base_model_name_or_path=str(DEMO)),
        "an adapter is not part",
    ),
    "a pipe": (lambda folder: os.mkfifo(folder / "vae" / "x.json"), "neither a file nor a directory"),
    "a link in a circle": (lambda folder: link(folder / "vae" / "x", Path("x")), "neither a file nor a directory"),
    "code": (lambda folder: (folder / "vae" / "stranger.py").touch(), "stranger.py is code"),
    "code where nobody looks": (lambda folder: (folder / "pipeline.py").touch(), "pipeline.py is code"),
    "code of its checker": (lambda folder: (folder / "safety_checker" / "x.py").touch(), "x.py is code"),
    "attention of the hub": (
        lambda folder: add(folder / "text_encoder" / "config.json", attn_implementation="somebody/kernel"),
        "names code by attn_implementation",
    ),
    "code of a part": (
        lambda folder: add(folder / "text_encoder" / "config.json", text_config={"auto_map": AUTO_MAP}),
        "names code by auto_map",
    ),
    "a class that looks for code": (
        lambda folder: add(folder / "model_index.json", text_encoder=["transformers", "AutoModel"]),
        "only transformers.CLIPTextModel",
    ),
    "another class": (
        lambda folder: add(folder / "model_index.json", vae=["diffusers", "UNet2DModel"]),
        "only diffusers.AutoencoderKL or diffusers.AutoencoderTiny",
    ),
    "another part": (
        lambda folder: add(folder / "model_index.json", unet=["diffusers", "UNet2DModel"]),
        "unet is of diffusers, and is not part",
    ),
    "a pipeline of its own": (lambda folder: add(folder / "model_index.json", _class_name=["x", "X"]), "is of x"),
    "a component elsewhere": (
        lambda folder: add(folder / "model_index.json", **{"../x": ["diffusers", "AutoencoderTiny"]}),
        "not a component's name",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_refused_before_anything_is_loaded(folder: Path, name: str) -> None:
    act, words = CHANGES[name]
    act(folder)
    with pytest.raises(OSError, match=words):
        load_pipeline(placement(folder))


def test_the_doctor_says_so_beforehand(folder: Path, tmp_path: Path) -> None:
    link(folder / "vae" / "config.json", Path("/etc/hostname"))
    settings = Settings(data_dir=tmp_path / "data", weights=(str(folder),), device="cpu")
    assert any("leads out" in finding.message for finding in doctor.run_checks(settings) if not finding.ok)


def test_links_within_are_followed(folder: Path) -> None:
    (folder / "vae").rename(folder / "other")
    (folder / "vae").symlink_to("other")
    verify.verify(folder)


def test_the_hubs_cache_is_loaded_as_it_lies(tmp_path: Path) -> None:
    """All links into its blobs. The way there may be a link too; those to folders there, or to others' are refused."""
    snapshot = cached(tmp_path / "real", "somebody/weights", DEMO)
    (tmp_path / "home").symlink_to("real")
    place = specs.parse_spec(str(tmp_path / "home" / snapshot.relative_to(tmp_path / "real")))
    assert isinstance(place, Path)
    assert (place / "vae" / "config.json").is_symlink()
    pipeline, _ = load_pipeline(placement(place))
    assert hub.components(place) == list(hub.read_model_index(DEMO))
    assert pipeline.vae is not None
    # A folder within it, on its own.
    assert safety_checker.load(placement(place)).is_unsafe([Image.new("RGB", (64, 64))]) == [False]
    other = cached(tmp_path / "real", "somebody/else", DEMO / "vae")
    link(snapshot / "vae" / "config.json", (other / "config.json").resolve())
    with pytest.raises(OSError, match="leads out"):
        load_pipeline(placement(place))
    hidden = snapshot.parents[1] / "blobs" / "hidden"
    hidden.mkdir()
    (hidden / "stranger.py").touch()
    link(snapshot / "vae", hidden)
    with pytest.raises(OSError, match="leads out"):
        load_pipeline(placement(place))


def test_a_pickle_by_the_name_of_safetensors_is_not_unpickled(folder: Path, mark: Path) -> None:
    for path in folder.glob("*/*.safetensors"):
        path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(OSError, match=r"weights cannot be read|safetensors"):
        load_pipeline(placement(folder))
    with pytest.raises(GenerationFailed):
        safety_checker.load(placement(folder)).is_unsafe([])
    assert not mark.exists()
    pickle.loads((folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert mark.exists()


@pytest.fixture
def stranger(folder: Path, mark: Path) -> Callable[[str], Path]:
    """Puts code into a component, which its configurations name, and makes model_index.json ask for it."""

    def put(name: str) -> Path:
        (folder / name / "stranger.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n", encoding="utf-8")
        for path in (folder / name).glob("*config.json"):
            add(path, auto_map=AUTO_MAP, model_type="stranger", image_processor_type="Stranger")
        if name != "safety_checker":
            kind = "AutoTokenizer" if "tokenizer" in name else "AutoModel"
            add(folder / "model_index.json", **{name: ["transformers", kind]})
        return folder

    return put


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "tokenizer", "transformer", "vae", "scheduler"])
def test_code_beside_the_weights_does_not_run(stranger: Callable[[str], Path], mark: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"names code|is code"):
        load_pipeline(placement(stranger(name)))
    assert not mark.exists()


@pytest.mark.parametrize("command", ["bench", "doctor", "serve"])
def test_no_command_runs_it_and_nobody_is_asked(
    stranger: Callable[[str], Path], mark: Path, tmp_path: Path, command: str
) -> None:
    """Whoever was asked would say yes."""
    settings = ("--device", "cpu", "--port", "0", "--tls-port", "0", "--data-dir", str(tmp_path / "data"))
    line = [sys.executable, "-m", "server", command, str(stranger("text_encoder")), *settings]
    done = subprocess.run(line, cwd=ROOT, input="y\n" * 20, capture_output=True, text=True, timeout=100)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "names code by auto_map" in said
    assert "[y/N]" not in said
    assert "Traceback" not in said
    assert not mark.exists()


def test_code_of_a_checker_does_not_run_and_nobody_is_asked(
    stranger: Callable[[str], Path], mark: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(GenerationFailed, match=r"could not be loaded.*(names code|is code)"):
        safety_checker.load(placement(stranger("safety_checker"))).is_unsafe([])
    assert not mark.exists()
    assert "[y/N]" not in capfd.readouterr().out


def test_a_token_by_the_name_of_code_is_a_token(folder: Path) -> None:
    words = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    add(folder / "tokenizer" / "vocab.json", auto_map=max(words.values()))
    verify.verify_pipeline(folder, pipeline.NON_PIPELINE_COMPONENTS)
