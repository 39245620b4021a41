"""A GPU that is not there: tensors without bytes, and a compiler that makes the GPU's programs without running them.

PyTorch's fake tensors say of every operation on which device its result is and in which type. Inductor and Triton need
no GPU to compile; what they would ask its driver, this module answers. So a test sees each kernel compiled to the
GPU's machine code (a cubin), but no number that it computes.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx, config, metrics
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _triton
from triton.backends.compiler import GPUTarget

#: A call in Inductor's Python program that starts a kernel: of Triton, of a library, or of PyTorch.
_LAUNCH = re.compile(r"^\s+(?:\w+\.run\(|extern_kernels\.|\w+ = torch\.ops\.|torch\.ops\.)", re.MULTILINE)


@dataclass(frozen=True)
class Model:
    """A GPU model. Shared memory is the bytes that a kernel may use of one multiprocessor."""

    name: str
    capability: tuple[int, int]
    num_multiprocessors: int
    shared_memory: int

    @property
    def number(self) -> int:
        """The capability as one number, such as 90."""
        return 10 * self.capability[0] + self.capability[1]


A100 = Model("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166_912)
RTX_4090 = Model("NVIDIA GeForce RTX 4090", (8, 9), 128, 101_376)
H100 = Model("NVIDIA H100 80GB HBM3", (9, 0), 132, 232_448)
RTX_5090 = Model("NVIDIA GeForce RTX 5090", (12, 0), 170, 101_376)


@dataclass
class Compiled:
    """What the compiler made.

    Attributes:
        num_graphs: the number of graphs.
        kernels: the size in bytes of each kernel's machine code, by the kernel's name.
        targets: the GPU architectures that the kernels are for, such as "sm_90".
        launches: how many kernels the code of a "joint" and of a "single" block launches, for one image.
        launches_by_graph: how many kernels the code of each graph launches.
        bytes_by_graph: how many bytes these read and write, as the compiler calculates for the first sizes it sees.
    """

    num_graphs: int = 0
    kernels: dict[str, int] = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)
    launches: dict[str, int] = field(default_factory=dict)
    launches_by_graph: list[int] = field(default_factory=list)
    bytes_by_graph: list[int] = field(default_factory=list)

    def launches_a_step(self, num_joint: int, num_single: int) -> int:
        """Return how many kernels the blocks launch in a step of a transformer with so many blocks of each kind."""
        return num_joint * self.launches["joint"] + num_single * self.launches["single"]


@contextmanager
def fake_gpu(model: Model) -> Iterator[Compiled]:
    """Make tensors on "cuda" fake tensors of this GPU model; yield what is compiled meanwhile."""
    compiled = Compiled()
    with ExitStack() as stack:
        for target, name, value in (*_pytorch(model), *_inductor(model), *_recorders(compiled)):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(config.patch(compile_threads=1, fx_graph_cache=False, use_static_triton_launcher=False))
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        _forget_answers()
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(_TritonDriver(model))
        stack.callback(setattr, triton.runtime.driver, "_active", before)
        stack.callback(_forget_answers)
        stack.callback(torch.compiler.reset)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield compiled


def _properties(model: Model) -> SimpleNamespace:
    major, minor = model.capability
    return SimpleNamespace(
        name=model.name,
        major=major,
        minor=minor,
        multi_processor_count=model.num_multiprocessors,
        total_memory=80 << 30,
        warp_size=32,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2_048,
        max_threads_per_block=1_024,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=model.shared_memory,
        shared_memory_per_multiprocessor=model.shared_memory + 1_024,
        L2_cache_size=50 << 20,
        gcnArchName="",
    )


def _pytorch(model: Model) -> list[tuple[Any, str, Any]]:
    """Return what PyTorch says of the GPU."""
    return [
        (torch.cuda, "get_device_capability", lambda *_: model.capability),
        (torch.cuda, "get_device_name", lambda *_: model.name),
        (torch.cuda, "get_device_properties", lambda *_: _properties(model)),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "mem_get_info", lambda *_: (80 << 30, 80 << 30)),
        (torch.nn.functional, "scaled_dot_product_attention", _attention),
    ]


def _attention(query: Any, key: Any, value: Any, *_: Any, scale: float | None = None, **__: Any) -> Any:
    """Compute attention by the kernel that PyTorch chooses on a GPU; without one, it would choose none."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]


def _inductor(model: Model) -> list[tuple[Any, str, Any]]:
    """Return what Inductor asks about the GPU."""
    answers: dict[str, Any] = {
        "is_available": True,
        "is_bf16_supported": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "get_compute_capability": model.number,
        "get_device_properties": _properties(model),
        "get_raw_stream": 0,
        "current_device": 0,
        "device_count": 1,
        "synchronize": None,
    }
    return [
        *(
            (CudaInterface, name, staticmethod(lambda *_, _value=value, **__: _value))
            for name, value in answers.items()
        ),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: _properties(model))),
        (CudaInterface.Worker, "current_device", staticmethod(lambda: 0)),
        (triton_helpers, "set_driver_to_gpu", lambda: None),
    ]


def _recorders(compiled: Compiled) -> list[tuple[Any, str, Any]]:
    """Return replacements that compile, note the result, and run nothing."""
    compile_kernel, compile_graph = CachingAutotuner._precompile_config, compile_fx.compile_fx
    programs: list[str] = []

    def precompile(self: Any, options: Any) -> Any:
        made = compile_kernel(self, options)
        name = self.inductor_meta.get("kernel_name", self.fn.__name__)
        compiled.kernels[f"graph {compiled.num_graphs + 1}: {name}"] = len(made.kernel.asm["cubin"])
        compiled.targets.add(f"sm_{made.kernel.metadata.target.arch}")
        return made

    def compile_only(graph: Any, *arguments: Any, **options: Any) -> Any:
        before = metrics.num_bytes_accessed
        # Inductor may call this function again for the same graph, with other options.
        with mock.patch.object(compile_fx, "compile_fx", compile_graph):
            compile_graph(graph, *arguments, **options)
        is_joint = any("ff_context" in node.name for node in graph.graph.find_nodes(op="placeholder"))
        num_launches = len(_LAUNCH.findall(programs[-1]))
        compiled.launches.setdefault("joint" if is_joint else "single", num_launches)
        compiled.launches_by_graph.append(num_launches)
        compiled.bytes_by_graph.append(int(metrics.num_bytes_accessed - before))
        # Inductor may raise an error before, after which Dynamo traces the graph again.
        compiled.num_graphs += 1
        return graph.forward

    return [
        (CachingAutotuner, "_precompile_config", precompile),
        (CachingAutotuner, "_make_launchers", lambda self: None),
        (compile_fx, "compile_fx", compile_only),
        # Inductor counts bytes only for its log.
        (compile_fx, "inductor_metrics_log", mock.Mock()),
        (GraphLowering, "save_output_code", staticmethod(programs.append)),
    ]


def _forget_answers() -> None:
    """Make PyTorch ask again what the GPU is and whether Triton can be used: it keeps the answers."""
    DeviceProperties.create.cache_clear()
    for name in dir(_triton):
        getattr(getattr(_triton, name), "cache_clear", lambda: None)()


class _TritonDriver:
    """Triton's view of the GPU."""

    binary_ext = "cubin"

    def __init__(self, model: Model) -> None:
        self._model = model
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {
                "max_shared_mem": model.shared_memory,
                "multiprocessor_count": model.num_multiprocessors,
                "max_num_regs": 65_536,
                "warpSize": 32,
                "sm_clock_rate": 1_980_000,
                "mem_clock_rate": 2_619_000,
                "mem_bus_width": 5_120,
            }
        )

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._model.number, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, *_: object) -> int:
        return 0

    def set_current_device(self, _: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda
