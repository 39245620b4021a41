"""Weights from strangers: nothing in them runs, and nothing outside of them is read."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from models import hub, safety, trust, weights
from models.base import CannotPaint, Placement
from models.weights import DEMO
from server import doctor
from server.settings import Settings
from tests.network_programs import cached


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


def placement(folder: Path) -> Placement:
    return Placement(folder, safety_checker="", device="cpu")


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
    "no index": (lambda folder: add(folder / "x.safetensors.index.json", weight_map=[]), "no index of weights"),
    "an adapter": (
        lambda folder: add(folder / "text_encoder" / "adapter_config.json", base_model_name_or_path=str(DEMO)),
        "an adapter is no part",
    ),
    "a pipeline of its own": (lambda folder: add(folder / "model_index.json", _class_name=["x", "X"]), "is of x"),
    "a component elsewhere": (
        lambda folder: add(folder / "model_index.json", **{"../x": ["diffusers", "AutoencoderTiny"]}),
        "no component's name",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_refused_before_anything_is_loaded(folder: Path, name: str) -> None:
    act, words = CHANGES[name]
    act(folder)
    with pytest.raises(OSError, match=words):
        weights.load(placement(folder))


def test_the_doctor_says_so_beforehand(folder: Path, tmp_path: Path) -> None:
    link(folder / "vae" / "config.json", Path("/etc/hostname"))
    settings = Settings(data_dir=tmp_path / "data", weights=(str(folder),), device="cpu")
    assert any("leads out" in finding.words for finding in doctor.examine(settings) if not finding.is_well)


def test_links_within_are_followed(folder: Path) -> None:
    (folder / "vae").rename(folder / "other")
    (folder / "vae").symlink_to("other")
    trust.check(folder)


def test_the_hubs_cache_is_loaded_as_it_lies(tmp_path: Path) -> None:
    """All links into its blobs. The way there may be a link too; one to the blobs of others is refused."""
    snapshot = cached(tmp_path / "real", "somebody/weights", DEMO)
    (tmp_path / "home").symlink_to("real")
    place = weights.place(str(tmp_path / "home" / snapshot.relative_to(tmp_path / "real")))
    assert isinstance(place, Path)
    assert (place / "vae" / "config.json").is_symlink()
    pipeline, _ = weights.load(placement(place))
    assert hub.components(place) == list(hub.index(DEMO))
    assert pipeline.vae is not None
    # A folder within it, on its own.
    assert safety.load(placement(place)).is_unsafe([Image.new("RGB", (64, 64))]) == [False]
    other = cached(tmp_path / "real", "somebody/else", DEMO / "vae")
    link(snapshot / "vae" / "config.json", (other / "config.json").resolve())
    with pytest.raises(OSError, match="leads out"):
        weights.load(placement(place))


def test_a_pickle_by_the_name_of_safetensors_is_not_unpickled(folder: Path, mark: Path) -> None:
    for path in folder.glob("*/*.safetensors"):
        path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(OSError, match=r"weights cannot be read|safetensors"):
        weights.load(placement(folder))
    with pytest.raises(CannotPaint):
        safety.load(placement(folder)).is_unsafe([])
    assert not mark.exists()
    pickle.loads((folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert mark.exists()


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "tokenizer", "transformer", "vae", "scheduler"])
def test_code_beside_the_weights_does_not_run(folder: Path, mark: Path, name: str) -> None:
    """Configurations name it, and the pipeline is the usual one."""
    (folder / name / "stranger.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n", encoding="utf-8")
    kinds = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor")
    for path in (folder / name).glob("*config.json"):
        add(path, auto_map=dict.fromkeys(kinds, "stranger.Stranger"))
    pipeline, _ = weights.load(placement(folder))
    assert type(pipeline).__module__.startswith("diffusers.")
    assert not mark.exists()


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_code_of_a_checker_does_not_run_and_nobody_is_asked(
    folder: Path, mark: Path, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    checker = folder / "safety_checker"
    (checker / "stranger.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n", encoding="utf-8")
    kinds = ("AutoConfig", "AutoModelForImageClassification", "AutoImageProcessor")
    names = {"model_type": "stranger", "image_processor_type": "Stranger"}
    add(checker / file, auto_map=dict.fromkeys(kinds, "stranger.Stranger"), **names)
    with pytest.raises(CannotPaint, match="could not be loaded"):
        safety.load(placement(folder)).is_unsafe([])
    assert not mark.exists()
    assert "[y/N]" not in capfd.readouterr().out
