"""The compiler makes the machine code of FLUX's blocks in their true widths, for each generation of GPUs and each tier.

One graph must serve all sizes: a request must never wait for the compiler.
"""

import copy
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch._dynamo.utils import counters
from torch.nn import functional
from triton.backends.nvidia.compiler import CUDABackend

from models.benchmark import random_weights
from models.benchmark.random_weights import SHAPES
from models.flux import compilation, decoder, first_block_cache, warm_up
from models.flux.acceleration import Tier, random_inputs
from models.flux.first_block_cache import FirstBlockCache
from models.flux.lora_layers import installed, with_compiled_loras
from models.image_size import PRESETS
from models.loading import fp8, quantization
from tests.cuda.fake_gpu import A100, H100, RTX_4090, RTX_5090, Compiled, Model, fake_gpu
from tests.cuda.recorder import recorded

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(1200)]

#: As many blocks as show that the second one of a kind uses the first one's code again.
BLOCKS = {"num_layers": 2, "num_single_layers": 2}
#: FLUX.1's number of blocks of each kind.
NUM_JOINT, NUM_SINGLE = 19, 38
#: The sizes in pixels that are tried after the warm-up: those of fal's presets, the extremes, and two with odd numbers
#: of tokens, also in both directions.
SIZES = [*PRESETS.values(), (64, 64), (2048, 2048), (336, 528), (1520, 16)]
TEXT_TOKENS = 512
#: The tokens that Redux puts behind those of the prompt.
REDUX_TOKENS = 729


def transformer(in_channels: int = 64) -> Any:
    """Build FLUX.1's transformer on the GPU with a few blocks, in bf16; its tokens have `in_channels` numbers."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            made = FluxTransformer2DModel(
                **{**SHAPES["full"]["transformer"], **BLOCKS, "in_channels": in_channels, "out_channels": 64}
            ).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    if compilation.has_faster_attention():
        compilation.choose_attention(made)
        backends = {block.attn.processor._attention_backend for block in made.transformer_blocks}
        assert backends == {AttentionBackendName._NATIVE_CUDNN}
    return made


def tiny_tier(*, dynamic: bool = True) -> Tier:
    """Build a tier with tiny shapes, whose blocks are compiled at the first forward: for any size, if `dynamic`."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            tiny = FluxTransformer2DModel(**SHAPES["tiny"]["transformer"]).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    tiny.compile_repeated_blocks(fullgraph=True, dynamic=dynamic)
    return Tier("none", tiny, is_ready=False)


def serve_all_sizes(tier: Tier) -> None:
    """Run a forward for each size and number of images; a forward that needs the compiler again raises an error."""
    batches = (1, 2, 4) if tier.shares_forwards else (1,)
    kinds = [(batch, width * height // 256, TEXT_TOKENS) for width, height in SIZES for batch in batches]
    with torch.compiler.set_stance("fail_on_recompile"), torch.no_grad():
        for kind in (*kinds, (1, 4096, TEXT_TOKENS + REDUX_TOKENS)):
            inputs = random_inputs(tier.transformer.config, kind, "cuda", torch.bfloat16)
            check_velocity(tier.transformer(**inputs)[0], kind)


def check_velocity(velocity: torch.Tensor, kind: tuple[int, int, int]) -> None:
    assert velocity.shape == (*kind[:2], 64)
    assert (velocity.device.type, velocity.dtype) == ("cuda", torch.bfloat16)


def skip_blocks(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the forwards of the tier "high", which calls the blocks one by one, with every other one skipping blocks."""
    cache, answers = FirstBlockCache(), itertools.cycle((False, True))
    monkeypatch.setattr(FirstBlockCache, "can_skip", lambda *_: next(answers))
    with torch.compiler.set_stance("fail_on_recompile"), torch.no_grad():
        for _ in range(4):
            kind = (1, 21 * 33, TEXT_TOKENS)
            inputs = random_inputs(tier.transformer.config, kind, "cuda", torch.bfloat16)
            del inputs["return_dict"]
            check_velocity(first_block_cache.velocity(tier.transformer, cache, **inputs), kind)
    assert cache.num_skipped == 2


@contextmanager
def compiling_for(model: Model) -> Iterator[Compiled]:
    """Compile for this GPU in the block, with the attention that the server tries first on it."""
    with fake_gpu(model) as compiled, ExitStack() as stack:
        if compilation.has_faster_attention():
            stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", cudnn_attention))
        yield compiled


def cudnn_attention(query: Any, key: Any, value: Any, *_: Any, scale: float | None = None, **__: Any) -> Any:
    """Compute attention by cuDNN's kernel, as PyTorch does on a GPU if it may use only that."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, False, scale=scale)[0]


def check(compiled: Compiled, model: Model, num_graphs: int) -> None:
    """Check that everything was compiled for this GPU in this number of graphs."""
    assert compiled.num_graphs == num_graphs
    assert compiled.targets == {f"sm_{model.number}"}
    assert all(size > 0 for size in compiled.kernels.values())
    assert not counters["graph_break"]


def report(compiled: Compiled, name: str) -> None:
    """Print how much was compiled, and how many kernels FLUX.1's blocks launch in a step."""
    launches = compiled.launches_a_step(NUM_JOINT, NUM_SINGLE)
    print(
        f"{name}: {compiled.num_graphs} graphs, {len(compiled.kernels)} Triton kernels; {launches} launches a step,"
        f" of which {compiled.launches['joint']} a joint and {compiled.launches['single']} a single block"
    )


@pytest.mark.parametrize("model", [A100, RTX_4090, H100, RTX_5090], ids=lambda model: model.name)
def test_bf16(model: Model) -> None:
    with compiling_for(model) as compiled:
        exact = compilation.compile_blocks(compilation.clone_sharing_weights(transformer()))
        tier = Tier("none", exact, is_ready=False)
        tier.warm_up("cuda", torch.bfloat16, TEXT_TOKENS)
        report(compiled, f"{model.name}, none")
        serve_all_sizes(tier)
        check(compiled, model, num_graphs=4)


@pytest.mark.parametrize("in_channels", [128, 384], ids=["canny and depth", "fill"])
def test_other_kinds_of_weights(in_channels: int) -> None:
    """The blocks are the same, so their kernels may come from an earlier test; the graphs are compiled anew."""
    with compiling_for(H100) as compiled:
        exact = compilation.compile_blocks(compilation.clone_sharing_weights(transformer(in_channels)))
        tier = Tier("none", exact, is_ready=False)
        tier.warm_up("cuda", torch.bfloat16, TEXT_TOKENS)
        serve_all_sizes(tier)
        print(f"{H100.name}, none, {in_channels} channels: {compiled.num_graphs} graphs")
        assert compiled.num_graphs == 4 and not counters["graph_break"]


def quantized_clone(plan: str) -> Any:
    """Return a quantized transformer: a clone that is quantized, or with the plan "fp8", a clone of a quantized one."""
    # torchao asks PyTorch for a GPU; everything else must not, because PyTorch would start it.
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        if plan == "fp8":
            placed = transformer()
            # Moving a module's fake parameters needs what the recorder replaces.
            with recorded():
                fp8.quantize(placed, "cuda")
            return compilation.clone_sharing_weights(placed)
        clone = compilation.clone_sharing_weights(transformer())
        fp8.quantize(clone)
        return clone


@pytest.mark.parametrize(
    ("model", "plan"),
    [(RTX_4090, "fp8"), (H100, "resident"), (RTX_5090, "fp8")],
    ids=lambda each: getattr(each, "name", each),
)
def test_fp8(model: Model, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiers "regular" and "high" run the same blocks."""
    with compiling_for(model) as compiled:
        quantized = quantized_clone(plan)
        tier = Tier("regular", compilation.compile_blocks(quantized), shares_forwards=True, is_ready=False)
        tier.warm_up("cuda", torch.bfloat16, TEXT_TOKENS)
        report(compiled, f"{model.name}, regular with the plan {plan}")
        serve_all_sizes(tier)
        skip_blocks(tier, monkeypatch)
        check(compiled, model, num_graphs=8)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("model", [A100, RTX_4090, H100, RTX_5090], ids=lambda model: model.name)
def test_weights_in_8_and_4_bits(model: Model, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tiers run the same blocks."""
    with compiling_for(model) as compiled:
        quantized = transformer()
        # Moving a module's fake parameters needs what the recorder replaces.
        with recorded():
            quantization.quantize(quantized, kind, "cuda")
        clone = compilation.compile_blocks(compilation.clone_sharing_weights(quantized))
        tier = Tier("regular", clone, shares_forwards=True, is_ready=False)
        tier.warm_up("cuda", torch.bfloat16, TEXT_TOKENS)
        report(compiled, f"{model.name}, all tiers with the plan {kind}")
        serve_all_sizes(tier)
        skip_blocks(tier, monkeypatch)
        check(compiled, model, num_graphs=8)


@pytest.mark.parametrize(
    ("model", "form"),
    [(A100, "bf16"), (RTX_4090, "fp8"), (H100, "bf16"), (RTX_4090, "int8"), (RTX_5090, "int4")],
    ids=lambda each: getattr(each, "name", each),
)
def test_loras_of_any_rank(model: Model, form: str) -> None:
    """The same four graphs serve all ranks. In fp8, query, key and value are joined, and so are their LoRAs."""
    with compiling_for(model) as compiled:
        if form in quantization.BYTES:
            base = transformer()
            with recorded():
                quantization.quantize(base, form, "cuda")
        else:
            base = quantized_clone("fp8") if form == "fp8" else transformer()
        clone = compilation.compile_blocks(compilation.clone_sharing_weights(base))
        tier, like = Tier("none", clone), torch.empty(0, dtype=torch.bfloat16, device="cuda")
        for rank in warm_up.RANKS:
            with installed(clone, with_compiled_loras(clone, {}, like, rank)):
                tier.run_all_kinds(clone, "cuda", torch.bfloat16, TEXT_TOKENS)
        num_graphs = compiled.num_graphs
        for rank in (1, 16, 64, 128, 400):
            with installed(clone, with_compiled_loras(clone, {}, like, rank)):
                serve_all_sizes(tier)
        print(f"{model.name}, none with LoRAs, {form}: {num_graphs} graphs for all ranks and sizes")
        check(compiled, model, num_graphs=4)


def decode(vae: Any, width: int = 1024, height: int = 1024) -> None:
    """Decode an image of this size in pixels."""
    latents = torch.zeros(1, vae.config.latent_channels, height // 8, width // 8, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        (pixels,) = vae.decode(latents, return_dict=False)
    assert (pixels.shape, pixels.device.type) == ((1, 3, height, width), "cuda")


def first_block(vae: Any) -> tuple[int, int]:
    """Return the operations of the decoder's first residual block in the warm-up, and the bytes they read and write."""
    block, counts = vae.decoder.mid_block.resnets[0], []
    with recorded() as recorder:
        block.register_forward_pre_hook(lambda *_: recorder.restart())
        block.register_forward_hook(lambda *_: counts.append((recorder.launches, recorder.moved)))
        decoder.warm_up(vae)
    return counts[0]


def autoencoder() -> Any:
    """Build FLUX.1's autoencoder on the GPU, in bf16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return random_weights.autoencoder("full").eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("model", [A100, RTX_4090, H100, RTX_5090], ids=lambda model: model.name)
def test_decoding(model: Model) -> None:
    with fake_gpu(model) as compiled:
        vae = compilation.compiled_autoencoder(autoencoder())
        decoder.warm_up(vae)
        with torch.compiler.set_stance("fail_on_recompile"):
            for size in SIZES:
                decode(vae, *size)
        operations, before = first_block(autoencoder())
        launches, after = compiled.launches_by_graph[0], compiled.bytes_by_graph[0]
        print(
            f"{model.name}, decoding: {compiled.num_graphs} graphs, {len(compiled.kernels)} Triton kernels; a residual "
            f"block of 512 channels reads and writes {before / 1e6:.0f} MB in {operations} operations uncompiled, and "
            f"{after / 1e6:.0f} MB in {launches} kernels compiled"
        )
        assert before and after
        # The five pairs of numbers of channels, and one that has a setting without effect here.
        check(compiled, model, num_graphs=6)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a tiny transformer with real weights on the CPU. Only torchao's question for a GPU gets a false answer."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    torch.manual_seed(0)
    return FluxTransformer2DModel(**SHAPES["tiny"]["transformer"]).to(torch.bfloat16).eval()


@torch.no_grad()
def test_joined_projections_change_no_number(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    separate = copy.deepcopy(tiny)
    fp8.quantize(tiny)
    monkeypatch.setattr(fp8, "_join_projections", lambda _: None)
    fp8.quantize(separate)
    names = {name.rpartition(".")[2] for name, _ in tiny.named_modules()}
    assert {"to_qkv", "to_added_qkv"} <= names and not {"to_q", "add_q_proj"} & names
    inputs = random_inputs(tiny.config, (1, 64, 32), "cpu", torch.bfloat16)
    assert torch.equal(tiny(**inputs)[0], separate(**inputs)[0])


def test_clones_share_quantized_weights(tiny: Any) -> None:
    num_parameters = tiny.num_parameters()
    fp8.quantize(tiny, "cpu")
    clone = compilation.clone_sharing_weights(tiny)
    pairs = zip(tiny.named_parameters(), clone.named_parameters(), strict=True)
    assert all(name == other_name and weight is other for (name, weight), (other_name, other) in pairs)
    matrices = [module.weight for name, module in tiny.named_modules() if fp8.is_large_matrix(module, name)]
    assert matrices and {weight.qdata.dtype for weight in matrices} == {torch.float8_e4m3fn}
    assert (tiny.dtype, tiny.num_parameters()) == (torch.bfloat16, num_parameters)


# -- faults, each of which a part above must find


def test_a_graph_break_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = FluxSingleTransformerBlock.forward

    def broken(block: Any, *arguments: Any, **options: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(block, *arguments, **options)

    monkeypatch.setattr(FluxSingleTransformerBlock, "forward", broken)
    with fake_gpu(H100), pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        tiny_tier().warm_up("cuda", torch.bfloat16, TEXT_TOKENS)


def test_code_that_fits_only_the_sizes_of_the_warm_up_is_found() -> None:
    with fake_gpu(H100):
        tier = tiny_tier(dynamic=False)
        tier.warm_up("cuda", torch.bfloat16, TEXT_TOKENS)
        with pytest.raises(RuntimeError, match="recompile"):
            serve_all_sizes(tier)


def test_a_kernel_that_does_not_assemble_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    make_ptx = CUDABackend.make_ptx

    def broken(backend: Any, *arguments: Any) -> Any:
        return str(make_ptx(backend, *arguments)).replace("ret;", "unknown;")

    monkeypatch.setattr(CUDABackend, "make_ptx", broken)
    with fake_gpu(H100), pytest.raises(RuntimeError, match="ptxas"):
        tiny_tier().warm_up("cuda", torch.bfloat16, TEXT_TOKENS)
