"""`torch.compile(fullgraph=True)` takes the whole stack of blocks with Triton kernels: fake CUDA tensors, no GPU."""

from collections import Counter

import pytest
import torch
from cogvx_kernels.triton import why_unavailable
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

if why_unavailable() is not None:
    pytest.skip(why_unavailable(), allow_module_level=True)

from cogvx_kernels import aot

from cogvx_fast.config import AttentionBackend
from cogvx_fast.plan import AttentionPlan
from cogvx_fast.transformer.binding import BoundBlock
from cogvx_fast.transformer.linear import ScaledFeedForward, ScaledLinear
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
    "layer_norm_modulate_quantized": 1,
    "qk_norm_rope": LAYERS,
    "attention": LAYERS,
    "quantize_rows": LAYERS,
    "scaled_linear": 3 * LAYERS,
    "scaled_linear_quantized": LAYERS,
    "gated_residual_layer_norm_modulate_quantized": 2 * LAYERS - 1,
    "gated_residual": 1,
}


def on_fake_cuda(model):
    for owner in model.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(torch.empty(parameter.shape, dtype=torch.float16), requires_grad=False))
    return model


def products(dim, dtype):
    """Of a block whose linears are W8A8 of `dtype`."""

    def linear(out_features, in_features):
        scales, bias = torch.empty(out_features), torch.empty(out_features, dtype=torch.float16)
        return ScaledLinear(torch.empty(out_features, in_features, dtype=dtype), scales, bias, torch.float16)

    ff = ScaledFeedForward(linear(4 * dim, dim), linear(dim, 4 * dim))
    return {"qkv": linear(3 * dim, dim), "out": linear(dim, dim), "ff": ff}


@pytest.mark.parametrize(
    ("variant", "quantized", "backend"),
    [
        ("2b", None, AttentionBackend.TRITON),
        ("5b", None, AttentionBackend.TRITON),
        ("2b", torch.int8, AttentionBackend.TRITON),
        ("5b", torch.float8_e4m3fn, AttentionBackend.TRITON_INT8),
    ],
)
def test_the_whole_transformer_is_one_graph(variant, quantized, backend):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

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
        bound = [BoundBlock(**how, **(products(dim, quantized) if quantized else {})) for _ in range(LAYERS)]
        step = StepInputs(TEXT, None, angles, None)
    with aot.pretend("sm_89"), mode, torch.no_grad():
        run = torch.compile(run_blocks, fullgraph=True, backend=keep)
        output = run(stream, model.transformer_blocks, [tuple(vectors)] * LAYERS, bound, step)
    assert output.shape == stream.shape and output.device.type == "cuda"
    (graph,) = graphs
    launched = Counter(str(node.target) for node in graph.graph.nodes if "cogvx_kernels" in str(node.target))
    expected = QUANTIZED_KERNELS if quantized else KERNELS
    if backend is AttentionBackend.TRITON_INT8:
        in_8_bits = {"qk_norm_rope": "qk_norm_rope_int8", "attention": "int8_attention"}
        expected = {in_8_bits.get(name, name): times for name, times in expected.items()}
    assert launched == {f"cogvx_kernels.{name}_triton.default": times for name, times in expected.items()}
