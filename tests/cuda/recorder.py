"""What the operations of fake tensors would do on a GPU: how much memory they take, and when the CPU waits for them."""

import traceback
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

#: The GPU's allocator rounds each tensor up to this many bytes.
_ROUNDING = 512


@dataclass(frozen=True)
class Event:
    """That a tensor, by number, got memory on a stream, or lost it: then `num_bytes` is 0."""

    tensor: int
    num_bytes: int
    stream: int


class Recorder(TorchDispatchMode):  # type: ignore[misc]
    """A record of the operations in its block.

    Attributes:
        live: the bytes of the tensors on the GPU that exist now.
        peak: the highest `live` since `restart`.
        waits: where the server's code copied a value or a tensor from the GPU since `restart`; the CPU waits for each.
        uploads: the shapes of the tensors that were copied to the GPU since `restart`.
        products: the dtypes of matrix products, convolutions and attention on the GPU since `restart`.
        pins: the number of tensors that were pinned, each by a copy in the host's memory, since `restart`.
        launches: the number of operations on the GPU since `restart`. Each is one or more kernels; views are none.
        trace: the tensors on the GPU as they come and go, from the start.
        stream: the number of the stream that operations run on.
        moved: the bytes that these operations read and write, if each reads its inputs and writes its results once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.launches = self.pins = self.moved = 0
        self.trace: list[Event] = []
        self.stream = self._num_tensors = 0
        self.waits: list[str] = []
        self.uploads: list[tuple[int, ...]] = []
        self.products: set[torch.dtype] = set()
        self._sizes = WeakIdKeyDictionary()
        self._pinned = WeakIdKeyDictionary()

    def restart(self) -> None:
        """Forget everything but the tensors that exist now."""
        self.peak, self.waits, self.uploads, self.products = self.live, [], [], set()
        self.launches = self.pins = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; answer those that would read the value of a fake tensor."""
        if func in _READS:
            if args[0].device.type == "cuda":
                self.waits.append(_place())
            return True if args[0].dtype == torch.bool or func is not _ITEM else 0.5
        result = func(*args, **(kwargs or {}))
        if func in _COPIES:
            copied = args[1] if func is torch.ops.aten.copy_.default else args[0]
            match copied.device.type, result.device.type:
                case "cpu", "cuda":
                    self.uploads.append(tuple(result.shape))
                case "cuda", "cpu":
                    self.waits.append(_place())
        if func.name().startswith(_PRODUCTS) and is_on_gpu(tree_leaves(result)[0]):
            # The first tensor may be a bias, which has one dimension.
            self.products.add(next(each.dtype for each in tree_leaves(args) if is_on_gpu(each) and each.ndim > 1))
        if not func.is_view and any(is_on_gpu(tensor) for tensor in tree_leaves(result)):
            self.launches += 1
            self.moved += sum(tensor.nbytes for tensor in tree_leaves((args, kwargs, result)) if is_on_gpu(tensor))
        tree_map(self._count, result)
        self.peak = max(self.peak, self.live)
        return result

    def pin(self, tensor: Any, *_: object) -> Any:
        """Return a copy that counts as pinned."""
        self.pins += 1
        copied = tensor.clone()
        self._pinned[copied] = True
        return copied

    def is_pinned(self, tensor: Any, *_: object) -> bool:
        """Return whether a tensor is such a copy."""
        return tensor in self._pinned

    def _count(self, tensor: Any) -> None:
        if not is_on_gpu(tensor):
            return
        storage = tensor.untyped_storage()
        if storage in self._sizes or not storage.nbytes():
            return
        size = -(-storage.nbytes() // _ROUNDING) * _ROUNDING
        self._sizes[storage] = size
        self.live += size
        self._num_tensors += 1
        self.trace.append(Event(self._num_tensors, size, self.stream))
        weakref.finalize(storage, self._release, size, self._num_tensors)

    def _release(self, size: int, tensor: int) -> None:
        self.live -= size
        self.trace.append(Event(tensor, 0, self.stream))

    @contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        """Run the block on a stream; tensors on it get memory of its own."""
        before, self.stream = self.stream, id(stream)
        try:
            yield
        finally:
            self.stream = before


def is_on_gpu(value: Any) -> bool:
    """Return whether a value is a tensor on the fake GPU."""
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"


_ITEM = torch.ops.aten._local_scalar_dense.default
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
#: The beginnings of the names of operations that multiply.
_PRODUCTS = tuple(
    f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "convolution", "_scaled_dot_product")
)
_READS = {_ITEM, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default}


def _place() -> str:
    """Return the file and line of the server's code that runs, such as "first_block_cache.py:50"."""
    frames = [frame for frame in traceback.extract_stack() if "/models/" in frame.filename]
    ours = [frame for frame in frames if "site-packages" not in frame.filename]
    return f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}" if ours else "elsewhere"


class _Stream:
    """A stream or an event: on fake tensors, nothing runs, so nothing has to wait."""

    def __init__(self, **_: object) -> None:
        pass

    def _nothing(self, *_: object) -> None:
        pass

    wait_event = wait_stream = synchronize = record = _nothing


@contextmanager
def recorded() -> Iterator[Recorder]:
    """Record the block, which runs within `fake_gpu`; give fake tensors what the engine needs of real ones."""
    numpy_of, recorder = torch.Tensor.numpy, Recorder()
    replacements: list[tuple[Any, str, Any]] = [
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "Event", _Stream),
        (torch.cuda, "stream", recorder.on_stream),
        (torch.cuda, "current_stream", lambda *_: _Stream()),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.Tensor, "record_stream", lambda *_: None),
        (torch.Tensor, "pin_memory", lambda tensor, *_: recorder.pin(tensor)),
        (torch.Tensor, "is_pinned", lambda tensor, *_: recorder.is_pinned(tensor)),
        (torch.Tensor, "numpy", lambda tensor: _zeros(tensor) if isinstance(tensor, FakeTensor) else numpy_of(tensor)),
        (FakeTensor, "data", property(torch.Tensor.data.__get__, _set_data)),
        (FakeTensor, "__deepcopy__", _copy),
        (Module, "_apply", _Apply()),
        # It draws again until every value is within bounds, which a fake tensor's values never are.
        (torch.nn.init, "_no_grad_trunc_normal_", lambda tensor, *_, **__: tensor),
    ]
    with ExitStack() as stack:
        for target, name, value in replacements:
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        yield stack.enter_context(recorder)


def _zeros(tensor: FakeTensor) -> Any:
    """Return zeros in place of values that do not exist, where a real tensor would return its values."""
    if tensor.device.type != "cpu" or tensor.dtype == torch.bfloat16:
        raise TypeError(f"no numpy array from {tensor.dtype} on {tensor.device}")
    return numpy.zeros(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def _set_data(tensor: Any, value: Any) -> None:
    """Set the data of a fake tensor together with its device, which PyTorch forgets."""
    torch.Tensor.data.__set__(tensor, value)
    if isinstance(value, FakeTensor):
        tensor.fake_device = value.fake_device


def _copy(tensor: Any, memo: dict[int, Any]) -> Any:
    """Copy a fake tensor, of which PyTorch would copy bytes that do not exist."""
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor.detach().clone()
    return memo[id(tensor)]


class _Apply:
    """Module._apply with new parameters, because the data of fake ones cannot be exchanged. Tied weights stay tied."""

    def __get__(self, module: Any, _: object = None) -> Any:
        return lambda function, recurse=True: self._run(module, function, recurse)

    @staticmethod
    def _run(module: Any, function: Any, recurse: bool) -> Any:
        new: dict[int, tuple[Any, Any]] = {}
        for part in module.modules() if recurse else [module]:
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in new:
                        with torch.no_grad():
                            changed = function(tensor)
                        if changed is not tensor and isinstance(tensor, Parameter):
                            changed = Parameter(changed, tensor.requires_grad)
                        # Keep the old tensor too, so that its id is not used again meanwhile.
                        new[id(tensor)] = (tensor, changed)
                    tensors[name] = new[id(tensor)][1]
        return module
