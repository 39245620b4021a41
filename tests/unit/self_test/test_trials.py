"""Tests of the self test: on this CPU for real, and with doubles for what needs a GPU."""

import json
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from models.base import EngineConfig
from models.flux import compilation, verdict
from models.loading.specs import DEMO
from models.self_test import engine, kernels, machine
from models.self_test.trials import Failed, Result, Skipped, Subject, Trial, run
from tests.support import tiny_flux

CPU, GPU = Subject("cpu"), Subject("cuda")


def result_of(trial: Trial, subject: Subject) -> Result:
    (result,) = run([trial], subject, lambda _: None)
    return result


def named(name: str) -> Trial:
    return next(trial for trial in (*machine.TRIALS, *kernels.TRIALS, *engine.TRIALS) if trial.name == name)


def test_each_outcome_becomes_a_result() -> None:
    def raises(error: Exception) -> Any:
        def test(_: Subject) -> str:
            raise error

        return test

    trials = [
        Trial("a", lambda subject: subject.device),
        Trial("b", raises(Failed("too much"))),
        Trial("c", raises(Skipped("not here"))),
        Trial("d", raises(ValueError("one line\nanother"))),
    ]
    announced: list[str] = []
    assert list(run(trials, CPU, announced.append)) == [
        Result("a", "passed", "cpu"),
        Result("b", "failed", "too much"),
        Result("c", "skipped", "not here"),
        Result("d", "failed", "ValueError: one line"),
    ]
    assert announced == ["a", "b", "c", "d"]


def test_nothing_fails_on_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The self test starts in the directory of an application that has a module with the name of this package.
    (tmp_path / "models.py").write_text("raise RuntimeError('this module belongs to the application')")
    monkeypatch.chdir(tmp_path)
    results = {result["name"]: result for result in verdict.run_in_child("cpu", None)}
    assert {name for name, result in results.items() if result["state"] == "failed"} == set()
    passed = {name for name, result in results.items() if result["state"] == "passed"}
    assert passed == {"memory", "matrix product", "PyTorch's attention", "decoding during steps"}


def test_the_demo_weights_pass_on_this_cpu() -> None:
    result = result_of(engine.WEIGHTS, Subject("cpu", None, EngineConfig(DEMO, safety_checker="", device="cpu")))
    assert result.state == "passed"
    assert result.message.startswith("none differs from diffusers' pipeline by 0.00 of 255; regular generates")


# -- the machine


def test_a_card_without_bfloat16_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old card")
    result = result_of(named("driver"), GPU)
    assert result == Result("driver", "failed", "an old card has compute capability 7.5 and no bfloat16")


def test_a_card_that_is_nearly_full_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.loading.devices.free_memory", lambda _: 10**9)
    result = result_of(named("memory"), GPU)
    assert (result.state, "1.0 GB free" in result.message) == ("failed", True)


def test_a_driver_without_its_library_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", fail)
    result = result_of(named("driver library"), GPU)
    assert (result.state, "libcuda.so.1: cannot open" in result.message) == ("failed", True)


def test_a_directory_that_can_hold_no_programs_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trial, subject = named("directory of compiled code"), Subject("cuda", tmp_path / "new")
    assert result_of(trial, subject).state == "passed"
    monkeypatch.setattr("os.statvfs", lambda _: type("Status", (), {"f_flag": 8}))
    assert "noexec" in result_of(trial, subject).message


def test_a_machine_without_a_compiler_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "install gcc" in result_of(named("C compiler"), GPU).message


# -- computations


def test_a_wrong_product_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = torch.Tensor.__matmul__

    def wrong(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = multiply(one, other)
        return product if one.dtype == torch.float32 else product * 1.1

    monkeypatch.setattr("models.self_test.kernels.dtype_for", lambda *_: torch.bfloat16)
    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    result = result_of(named("matrix product"), CPU)
    assert (result.state, "more than 2%" in result.message) == ("failed", True)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_compiled_blocks_are_compared_at_all_presets(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Blocks are captured as for a GPU, but run eagerly, because compiling them takes minutes."""
    monkeypatch.setattr("models.flux.acceleration._WARM_TOKENS", (64, 48))
    monkeypatch.setattr(kernels, "PRESETS", {"a": (64, 64), "b": (128, 64)})
    monkeypatch.setattr(kernels, "FLUX_TEXT_TOKENS", 16)
    monkeypatch.setattr(kernels, "dtype_for", lambda *_: torch.float32)
    compile_blocks = FluxTransformer2DModel.compile_repeated_blocks
    monkeypatch.setattr(
        FluxTransformer2DModel, "compile_repeated_blocks", partialmethod(compile_blocks, backend="eager")
    )
    transformer = tiny_flux.transformer()
    compiled = compilation.compile_blocks(compilation.clone_sharing_weights(transformer))
    hook = compiled.proj_out.register_forward_hook(lambda _, __, output: output * factor)
    try:
        if factor == 1:
            assert "differ by 0.00% at most over 2 sizes" in kernels.compare(CPU, transformer, compiled, 0.02)
        else:
            with pytest.raises(Failed, match=r"differ by 50\.00%, more than 2%"):
                kernels.compare(CPU, transformer, compiled, 0.02)
    finally:
        hook.remove()
        torch._dynamo.reset()


# -- the child process


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Replace Python with a script that prints one result and announces a test. The caller appends the end.

    With --after, the script prints the result of a third test.
    """
    script = tmp_path / "python"
    script.write_text(
        """#!/bin/sh
case "$*" in
    *"--after compiled kernel")
        echo '{"name": "blocks", "state": "passed", "message": "fine"}'
        exit
        ;;
esac
echo '{"running": "driver"}'
echo '{"name": "driver", "state": "passed", "message": "fine"}'
echo '{"running": "compiled kernel"}'
"""
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return script


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("kill -SEGV $$", "the process ended by signal 11"),
        ("echo 'CUDA error' >&2; exit 3", "the process ended with exit code 3: CUDA error"),
    ],
)
def test_a_death_fails_the_test_that_ran_and_the_later_tests_run_too(child: Path, end: str, message: str) -> None:
    with child.open("a") as script:
        script.write(f"{end}\n")
    assert verdict.run_in_child("cuda", None) == [
        {"name": "driver", "state": "passed", "message": "fine"},
        {"name": "compiled kernel", "state": "failed", "message": message},
        {"name": "blocks", "state": "passed", "message": "fine"},
    ]


@pytest.mark.parametrize(
    ("end", "message"),
    [("exec sleep 60", "the self test took too long"), ("kill -TERM $$", "the process ended by signal 15")],
)
def test_a_self_test_that_is_stopped_does_not_go_on(child: Path, end: str, message: str) -> None:
    with child.open("a") as script:
        script.write(f"{end}\n")
    results = verdict.run_in_child("cuda", None, seconds=1)
    assert results[1:] == [{"name": "compiled kernel", "state": "failed", "message": message}]


def test_each_test_can_be_the_last_one_of_a_process() -> None:
    command = [sys.executable, "-m", "models.self_test", "cpu", "--after", engine.TRIALS[-1].name]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


def test_the_results_are_kept_for_each_driver(
    child: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    with child.open("a") as script:
        script.write("exit 1\n")
    assert verdict.failures(None) == {}
    directory = tmp_path / "compiled"
    assert list(verdict.failures(directory)) == ["compiled kernel"]
    assert "compiled kernel failed" in caplog.text
    assert [json.loads(path.read_text())[0]["name"] for path in directory.iterdir()] == ["driver"]
    child.unlink()
    # The stored results are read, and the tests do not run again.
    assert list(verdict.failures(directory)) == ["compiled kernel"]
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13010, raising=False)
    with pytest.raises(OSError, match="python"):
        verdict.failures(directory)
