"""`torch.compile(fullgraph=True)` takes the whole fast transformer with Triton kernels: fake CUDA tensors, no GPU."""

from collections import Counter

import pytest
import torch
from cogvx_kernels.triton import why_not
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

if why_not() is not None:
    pytest.skip(why_not(), allow_module_level=True)

from cogvx_kernels import aot

from cogvx_fast.attention import CAPABILITIES, AttentionBackend
from cogvx_fast.transformer import FastCogVideoXTransformer3DModel
from cogvx_fast.transformer.model import _run_blocks
from cogvx_fast.transformer.modulation import Modulation, NormModulation
from cogvx_fast.transformer.plan import BlockPlan
from tests import toy

LAYERS, TEXT, TOKENS = 3, 16, 28
KERNELS = ("layer_norm_modulate", "qk_norm_rope", "attention", "gated_residual_layer_norm_modulate", "gated_residual")


def on_fake_cuda(model):
    for owner in model.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(torch.empty(parameter.shape, dtype=torch.float16), requires_grad=False))
    return model


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_the_whole_transformer_is_one_graph(variant):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    model = FastCogVideoXTransformer3DModel.adopt(toy.transformer(variant, attention_head_dim=64, num_layers=LAYERS))
    for processor in model.joint_processors:
        processor.backend = CAPABILITIES[AttentionBackend.TRITON]
    rotary = variant != "2b"
    torch.compiler.reset()
    mode = FakeTensorMode()
    with mode, torch.device("cuda"):
        on_fake_cuda(model)
        dim = 128
        stream = torch.empty(2, TOKENS, dim, dtype=torch.float16)
        vectors = [NormModulation(*(torch.empty(1, 2, dim, dtype=torch.float16) for _ in range(3))) for _ in range(2)]
        final = [torch.empty(1, 1, dim, dtype=torch.float16) for _ in range(2)]
        modulation = Modulation([tuple(vectors)] * LAYERS, *final)
        angles = tuple(torch.empty(TOKENS - TEXT, 64) for _ in range(2)) if rotary else None
        plans = [BlockPlan(impl="triton") for _ in range(LAYERS)]
    with aot.pretend("sm_89"), mode, torch.no_grad():
        run = torch.compile(_run_blocks, fullgraph=True, backend=keep)
        output = run(model, stream, modulation, TEXT, angles, None, plans, False)
    assert output.shape == (2, TOKENS - TEXT, model.proj_out.out_features) and output.device.type == "cuda"
    (graph,) = graphs
    launched = Counter(str(node.target) for node in graph.graph.nodes if "cogvx_kernels" in str(node.target))
    assert launched == dict.fromkeys((f"cogvx_kernels.{name}_triton.default" for name in KERNELS), LAYERS)
