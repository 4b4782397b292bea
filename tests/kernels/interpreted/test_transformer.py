"""The fast transformer with every operation as a Triton kernel, interpreted: as close to fp32 as diffusers is."""

import copy

import pytest
import torch
from cogvx_kernels.triton import operations

from cogvx_fast import EngineConfig
from cogvx_fast.attention import CAPABILITIES, AttentionBackend
from cogvx_fast.transformer import EngineSession, FastCogVideoXTransformer3DModel, session
from cogvx_fast.transformer.plan import BlockPlan
from tests import toy
from tests.transformer.test_model import forward_inputs, relative

LAYERS = 2


@pytest.fixture(autouse=True)
def outputs():
    """The plain allocator: diffusers' own code is among what runs here."""


@torch.no_grad()
@pytest.mark.parametrize("variant", ["2b", "1.5-5b"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_forward_pass(variant, dtype, monkeypatch):
    truth = toy.transformer(variant, attention_head_dim=64, num_layers=LAYERS)
    reference = copy.deepcopy(truth).to(dtype)
    model = FastCogVideoXTransformer3DModel.adopt(copy.deepcopy(reference))
    for processor in model.joint_processors:
        processor.backend = CAPABILITIES[AttentionBackend.TRITON]
    monkeypatch.setattr(session, "plan_blocks", lambda blocks, *_: [BlockPlan(impl="triton") for _ in blocks])
    monkeypatch.setattr(BlockPlan, "is_current", lambda *_: True)
    calls = []
    for name in ("layer_norm_modulate", "gated_residual_layer_norm_modulate", "qk_norm_rope", "attention"):
        kernel = getattr(operations, name)
        monkeypatch.setattr(operations, name, lambda *a, kernel=kernel, name=name: calls.append(name) or kernel(*a))
    expected = truth(**forward_inputs(truth)).sample
    own = reference(**forward_inputs(reference, dtype=dtype)).sample
    with model.session(EngineSession(EngineConfig(), toy.scheduler())):
        output = model(**forward_inputs(model, dtype=dtype)).sample
    assert (
        calls
        == [
            "layer_norm_modulate",
            "qk_norm_rope",
            "attention",
            "gated_residual_layer_norm_modulate",
        ]
        * LAYERS
    )
    assert relative(output.float(), expected) <= 1.1 * relative(own.float(), expected)
