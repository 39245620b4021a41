"""The compiled decoder: it takes over when it is ready, decodes the same images, and costs nothing if it fails."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from models.base import DeviceLost, EngineConfig
from models.flux import decoder, loader
from models.flux.attempts import Attempts
from models.flux.compilation import compiled_autoencoder
from models.flux.engine import FluxEngine
from models.loading.specs import DEMO
from tests.support import tiny_flux
from tests.support.tiny_flux import difference, generate, make_request


@pytest.fixture(autouse=True)
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Capture blocks as for a GPU, but run them eagerly, because compiling them takes minutes."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield
    torch._dynamo.reset()


@pytest.fixture
def pipeline() -> FluxPipeline:
    return tiny_flux.pipeline()


@pytest.fixture
def engine(pipeline: FluxPipeline) -> FluxEngine:
    engine = FluxEngine(pipeline, tiny_flux.AllSafeChecker(), tiny_flux.tiers_of(pipeline.transformer)[:1], "cpu")
    engine.decoder.offer_compiled()
    return engine


def test_it_takes_over_after_the_warm_up_and_compiles_for_no_further_size(engine: FluxEngine) -> None:
    plain = engine.decoder._vae
    sizes = [(64, 64), (128, 64), (48, 80)]
    before = [generate(engine, make_request(width=width, height=height), 1)[0] for width, height in sizes]
    assert engine.warm_up()
    assert engine.decoder._vae is not plain
    assert not engine.warm_up()
    with torch.compiler.set_stance("fail_on_recompile"):
        after = [generate(engine, make_request(width=width, height=height), 1)[0] for width, height in sizes]
    assert max(map(difference, before, after)) <= 1


def test_the_original_keeps_its_weights(pipeline: FluxPipeline) -> None:
    clone = compiled_autoencoder(pipeline.vae)
    for name, weight in pipeline.vae.named_parameters():
        assert torch.equal(weight, clone.get_parameter(name))
        assert weight.is_contiguous(), name
    kernel = clone.decoder.conv_in.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_the_small_autoencoder_of_the_demo_is_not_compiled() -> None:
    engine = loader.load_engine(EngineConfig(DEMO, safety_checker="", device="cpu"))
    assert compiled_autoencoder(engine.pipeline.vae) is None


@pytest.mark.parametrize(
    ("error", "kind"), [(OSError("no compiler"), OSError), (torch.AcceleratorError("lost"), DeviceLost)]
)
def test_a_decoder_that_fails_is_left_out(
    engine: FluxEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, kind: type[Exception]
) -> None:
    def fail(_: Any) -> None:
        raise error

    engine.attempts, plain = Attempts(tmp_path), engine.decoder._vae
    monkeypatch.setattr(decoder, "warm_up", fail)
    with pytest.raises(kind):
        engine.warm_up()
    assert engine.decoder._vae is plain
    assert [text.partition(":")[0] for text in engine.info().unavailable] == ["compiled decoder"]
    assert not engine.warm_up()
    assert generate(engine, make_request(), 1)
    # After a failure that ended the process or lost the GPU, the next start does not try it again.
    loader._offer_compiled_decoder(engine)
    assert engine.decoder.is_cold == (kind is not DeviceLost)


def test_a_compiled_decoder_that_fails_later_is_replaced(engine: FluxEngine, caplog: pytest.LogCaptureFixture) -> None:
    plain = engine.decoder._vae
    before = generate(engine, make_request(), 1)[0]
    assert engine.warm_up()

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no program for this size")

    engine.decoder._vae.decode = fail
    assert difference(generate(engine, make_request(), 1)[0], before) == 0
    assert engine.decoder._vae is plain
    assert "decoding runs uncompiled from now on" in caplog.text
