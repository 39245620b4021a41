"""What segments that grow save: the memory that PyTorch's allocator takes from the GPU for images of many sizes."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from models.benchmark import random_weights
from models.flux.acceleration import Tier
from models.flux.engine import FluxEngine
from models.flux.safety_checker import Unavailable
from models.loading.memory_plans import PLANS
from tests.cuda.allocator import LARGE_SEGMENT, MIB, SMALL_SEGMENT, Allocator, Piece
from tests.cuda.engines import request
from tests.cuda.fake_gpu import H100, fake_gpu
from tests.cuda.recorder import Event, recorded

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.timeout(900),
    # A fake tensor has no values, so diffusers takes those of an image for values from -1 to 1.
    pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor:FutureWarning"),
]

#: The presets and four other sizes, in an order in which small and large images alternate.
SIZES = (
    (1024, 768), (512, 512), (1024, 1024), (768, 1024), (704, 960),
    (1024, 576), (320, 448), (576, 1024), (1408, 704), (896, 640),
)  # fmt: skip


def reserved(trace: Sequence[Event], *, grows: bool) -> tuple[int, int]:
    """Return the bytes taken from the GPU for the tensors of a trace, and the highest number of bytes in use."""
    allocator, pieces, peak = Allocator(grows=grows), dict[int, Piece](), 0
    for event in trace:
        if event.num_bytes:
            pieces[event.tensor] = allocator.take(event.num_bytes, event.stream)
            peak = max(peak, allocator.in_use)
        else:
            allocator.give_back(pieces.pop(event.tensor))
    return allocator.reserved, peak


@pytest.mark.parametrize("grows", [False, True])
def test_memory_is_used_again(grows: bool) -> None:
    allocator = Allocator(grows=grows)
    for _ in range(3):
        pieces = [allocator.take(size * MIB) for size in (3, 5, 14)]
        assert allocator.in_use == 22 * MIB
        for piece in pieces:
            allocator.give_back(piece)
        assert allocator.in_use == 0
    # The first two fit into one segment. The third has one of its own, or the rest of the page and another page.
    assert allocator.reserved == LARGE_SEGMENT + (LARGE_SEGMENT if grows else 14 * MIB)


def test_small_tensors_are_apart() -> None:
    allocator = Allocator(grows=False)
    allocator.take(MIB)
    assert allocator.reserved == SMALL_SEGMENT
    allocator.take(MIB + 1)
    assert allocator.reserved == SMALL_SEGMENT + LARGE_SEGMENT
    allocator.take(1, stream=1)
    assert allocator.reserved == 2 * SMALL_SEGMENT + LARGE_SEGMENT


def test_only_segments_that_grow_take_a_slightly_larger_tensor() -> None:
    taken = {}
    for grows in (False, True):
        allocator = Allocator(grows=grows)
        for size in (30, 34, 38, 42):
            allocator.give_back(allocator.take(size * MIB))
        taken[grows] = allocator.reserved
    assert taken == {False: (30 + 34 + 38 + 42) * MIB, True: 3 * LARGE_SEGMENT}


@pytest.mark.parametrize("grows", [False, True])
def test_neighbours_join_in_any_order(grows: bool) -> None:
    allocator = Allocator(grows=grows)
    pieces = [allocator.take(4 * MIB) for _ in range(5)]
    for place in (3, 1, 2, 0, 4):
        allocator.give_back(pieces[place])
    allocator.take(LARGE_SEGMENT)
    assert allocator.reserved == LARGE_SEGMENT


@pytest.mark.parametrize("name", ["resident", "group-offload"])
def test_segments_that_grow_take_less_for_images_of_many_sizes(name: str) -> None:
    (plan,) = (plan for plan in PLANS if plan.name == name)
    with fake_gpu(H100), recorded() as recorder:
        pipeline = random_weights.build("full", "cuda" if plan.is_resident else "cpu", torch.bfloat16)
        pipeline = plan.apply(pipeline, "cuda")
        engine = FluxEngine(pipeline, Unavailable("not used"), [Tier("none", pipeline.transformer)], "cuda", plan=plan)
        lengths = []
        for seed, (width, height) in enumerate(SIZES):
            asked = request()
            asked.image_size.width, asked.image_size.height, asked.num_inference_steps = width, height, 2
            task = engine.start(asked, seed)
            while task.step < task.num_steps:
                engine.advance(task)
            engine.decode(task)
            lengths.append(len(recorder.trace))
    taken = {grows: [reserved(recorder.trace[:length], grows=grows) for length in lengths] for grows in (False, True)}
    (fixed, peak), (grown, _) = taken[False][-1], taken[True][-1]
    print(
        f"{name}, after {len(SIZES)} images of as many sizes, in GB: at most {peak / 1e9:.2f} in use; taken from the"
        f" GPU: {fixed / 1e9:.2f} in segments of fixed sizes, {grown / 1e9:.2f} in segments that grow"
    )
    assert peak <= grown < fixed
    # What is taken never shrinks, and more sizes take more.
    assert all(before <= after for before, after in pairwise(count for count, _ in taken[True]))
