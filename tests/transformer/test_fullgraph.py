"""`torch.compile(fullgraph=True)` takes the whole stack of blocks with Triton kernels: fake CUDA tensors, no GPU."""

import contextlib
import dataclasses
import sys
from collections import Counter

import pytest
import torch
from cogvx_kernels._triton import why_unavailable
from cogvx_kernels.targets import TARGETS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

if why_unavailable() is not None:
    pytest.skip(why_unavailable(), allow_module_level=True)

from cogvx_kernels import aot

from cogvx_fast.config import AttentionBackend
from cogvx_fast.parallel.degrees import Payload
from cogvx_fast.parallel.ranks import Axis
from cogvx_fast.parallel.sequence import SequenceSplit
from cogvx_fast.plan import AttentionPlan
from cogvx_fast.transformer.binding import BoundBlock
from cogvx_fast.transformer.linear import CublasLtLinear, FeedForwardPair, MergedLinear, ScaledFeedForward, ScaledLinear
from cogvx_fast.transformer.modulation import NormModulation
from cogvx_fast.transformer.stack import StepInputs, run_blocks
from tests.generation import fast_model

pytestmark = pytest.mark.slow

LAYERS, TEXT, TOKENS = 3, 16, 28
# How often each is launched: a block leaves its last addition to the next block's norm.
KERNELS = {
    "layer_norm_modulate": 1,
    "qk_norm_rope": LAYERS,
    "attention": LAYERS,
    "gated_residual_layer_norm_modulate": 2 * LAYERS - 1,
    "gated_residual": 1,
}
# In 8 bits a norm's rows are numbers and scales, and so are those between the two products of a feed-forward.
QUANTIZED_KERNELS = {
    "layer_norm_modulate": 1,
    "qk_norm_rope": LAYERS,
    "attention": LAYERS,
    "quantize_rows": LAYERS,
    "scaled_linear": 4 * LAYERS,
    "gated_residual_layer_norm_modulate": 2 * LAYERS - 1,
    "gated_residual": 1,
}
OF_TORCH = {
    AttentionBackend.SDPA: "scaled_dot_product_attention",
    AttentionBackend.SDPA_CUDNN: "_scaled_dot_product_cudnn_attention",
    AttentionBackend.SDPA_FLASH: "_scaled_dot_product_flash_attention",
}


def on_fake_cuda(model):
    for owner in model.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(torch.empty(parameter.shape, dtype=torch.float16), requires_grad=False))
    return model


def plain_products(dim):
    """Of a block whose linears are as they were: Q, K and V in one, GELU in cuBLASLt's epilogue."""

    def linear(out_features, in_features):
        return torch.empty(out_features, in_features, dtype=torch.float16), torch.empty(
            out_features, dtype=torch.float16
        )

    ff = FeedForwardPair(CublasLtLinear(*linear(4 * dim, dim)), MergedLinear(*linear(dim, 4 * dim)))
    return {"qkv": MergedLinear(*linear(3 * dim, dim)), "ff": ff}


def products(dim, dtype):
    """Of a block whose linears are W8A8 of `dtype`."""

    def linear(out_features, in_features):
        scales, bias = torch.empty(out_features), torch.empty(out_features, dtype=torch.float16)
        return ScaledLinear(torch.empty(out_features, in_features, dtype=dtype), scales, bias, torch.float16)

    ff = ScaledFeedForward(linear(4 * dim, dim), linear(dim, 4 * dim))
    return {"qkv": linear(3 * dim, dim), "out": linear(dim, dim), "ff": ff}


@contextlib.contextmanager
def stack_of(variant, quantized, backend):
    """Arguments of `run_blocks` on fake CUDA tensors, where this machine passes for one with a GPU."""
    model = fast_model(variant, attention_head_dim=64, num_layers=LAYERS)
    rotary = variant != "2b"
    torch.compiler.reset()
    mode = FakeTensorMode()
    with mode, torch.device("cuda"):
        on_fake_cuda(model)
        dim = 128
        stream = torch.empty(2, TOKENS, dim, dtype=torch.float16)
        vectors = [NormModulation(*(torch.empty(1, 2, dim, dtype=torch.float16) for _ in range(3))) for _ in range(2)]
        angles = tuple(torch.empty(TOKENS - TEXT, 64) for _ in range(2)) if rotary else None
        how = {"called": False, "fused": True, "attends": True, "operations": "triton"}
        how |= {"attention": AttentionPlan(backend), "guard": torch.empty(1, dtype=torch.int32)}
        # With adapters beside them linears are called, as those of 2b are here.
        ours = products(dim, quantized) if quantized else plain_products(dim) if rotary else {}
        bound = [BoundBlock(**how, **ours) for _ in range(LAYERS)]
        step = StepInputs(TEXT, None, angles, None)
    with aot.pretend(TARGETS["sm_89"]), mode, torch.no_grad():
        yield stream, model.transformer_blocks, [tuple(vectors)] * LAYERS, bound, step


CASES = pytest.mark.parametrize(
    ("variant", "quantized", "backend"),
    [
        ("2b", None, AttentionBackend.TRITON),
        ("5b", None, AttentionBackend.TRITON),
        ("2b", torch.int8, AttentionBackend.TRITON),
        ("5b", torch.float8_e4m3fn, AttentionBackend.TRITON_INT8),
        ("5b", None, AttentionBackend.SDPA),
        ("2b", None, AttentionBackend.SDPA_CUDNN),
        ("5b", torch.int8, AttentionBackend.SDPA_FLASH),
    ],
)


@CASES
def test_the_whole_transformer_is_one_graph(variant, quantized, backend):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    with stack_of(variant, quantized, backend) as arguments:
        run = torch.compile(run_blocks, fullgraph=True, backend=keep)
        output = run(*arguments)
    stream = arguments[0]
    assert output.shape == stream.shape and output.device.type == "cuda"
    (graph,) = graphs
    launched = Counter(str(node.target) for node in graph.graph.nodes if "cogvx_kernels" in str(node.target))
    expected = QUANTIZED_KERNELS if quantized else KERNELS
    if backend is AttentionBackend.TRITON_INT8:
        in_8_bits = {"qk_norm_rope": "qk_norm_rope_int8", "attention": "int8_attention"}
        expected = {in_8_bits.get(name, name): times for name, times in expected.items()}
    if backend in OF_TORCH:
        expected = {name: times for name, times in expected.items() if name != "attention"}
        assert sum(OF_TORCH[backend] in str(node.target) for node in graph.graph.nodes) == LAYERS
    assert launched == {f"cogvx_kernels.{name}_triton.default": times for name, times in expected.items()}


# What dynamo of some torch does not take, or not as a constant: files, modules, devices, caches.
NO_TENSOR_CODE = ("importlib", "os", "posixpath", "functools", "inspect", "pathlib", "subprocess", "torch.cuda")


@CASES
def test_the_regions_that_compile_call_nothing_but_tensor_code(variant, quantized, backend):
    """Seen as they run, not by what one version of dynamo happens to take."""
    called = set()

    def watch(frame, event, argument):
        if event != "call" or frame.f_back is None:
            return
        caller, callee = (str(f.f_globals.get("__name__")) for f in (frame.f_back, frame))
        if caller.startswith(("cogvx_fast.", "cogvx_kernels.ops")) and any(
            callee == name or callee.startswith(f"{name}.") for name in NO_TENSOR_CODE
        ):
            called.add(f"{caller}.{frame.f_back.f_code.co_name} calls {callee}.{frame.f_code.co_name}")

    with stack_of(variant, quantized, backend) as arguments:
        before = sys.getprofile()
        sys.setprofile(watch)
        try:
            run_blocks(*arguments)
        finally:
            sys.setprofile(before)
    assert called == set()


@pytest.fixture
def two_processes():
    """A process group of two, of which there is one, and whose collectives send nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield Axis(2, 1, torch.distributed.group.WORLD.group_name)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("split", "payload", "exchanges"),
    [("ulysses", Payload.NATIVE, 2), ("ulysses", Payload.INT8, 2), ("ring", Payload.NATIVE, 1)],
)
@pytest.mark.parametrize(("variant", "quantized"), [("2b", None), ("5b", None), ("5b", torch.int8)])
def test_one_of_several_processes_is_one_graph_too(two_processes, variant, quantized, split, payload, exchanges):
    """Its collectives are in it: Q, K and V in one exchange, attended values in another; or a turn of a ring."""
    axes = {"ulysses": Axis(), "ring": Axis()} | {split: two_processes}
    rows = SequenceSplit((TOKENS - 1, TOKENS), TEXT, 1, payload=payload, **axes)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    backend = AttentionBackend.SDPA if split == "ring" else AttentionBackend.TRITON
    with stack_of(variant, quantized, backend) as (stream, blocks, norms, bound, step):
        bound = [dataclasses.replace(how, split=rows, guard=None) for how in bound]
        angles = step.image_rotary_emb
        video = None if angles is None else tuple(torch.empty(TOKENS, 64, device="cuda") for _ in angles)
        step = dataclasses.replace(step, text_seq_length=0, image_rotary_emb=video)
        output = torch.compile(run_blocks, fullgraph=True, backend=keep)(stream, blocks, norms, bound, step)
    assert output.shape == stream.shape and output.device.type == "cuda"
    (graph,) = graphs
    sent = [node for node in graph.graph.nodes if "all_to_all" in str(node.target)]
    assert len(sent) == exchanges * LAYERS
