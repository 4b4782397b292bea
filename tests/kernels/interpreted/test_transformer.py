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
# Attention, and the operations between the products of a block: what runs where.
BACKENDS = {
    AttentionBackend.TRITON: ["qk_norm_rope", "attention"],
    AttentionBackend.TRITON_INT8: ["qk_norm_rope_int8", "int8_attention"],
}


@pytest.fixture(autouse=True)
def outputs():
    """The plain allocator: diffusers' own code is among what runs here."""


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "dtype", "backend"),
    [
        *((v, d, AttentionBackend.TRITON) for d in (torch.float16, torch.bfloat16) for v in ("2b", "1.5-5b")),
        ("1.5-5b", torch.float16, AttentionBackend.TRITON_INT8),
    ],
)
def test_a_forward_pass(variant, dtype, backend, monkeypatch):
    truth = toy.transformer(variant, attention_head_dim=64, num_layers=LAYERS)
    reference = copy.deepcopy(truth).to(dtype)
    model = FastCogVideoXTransformer3DModel.adopt(copy.deepcopy(reference))
    for processor in model.joint_processors:
        processor.backend = CAPABILITIES[backend]
    monkeypatch.setattr(session, "plan_blocks", lambda blocks, *_: [BlockPlan(impl="triton") for _ in blocks])
    monkeypatch.setattr(BlockPlan, "is_current", lambda *_: True)
    calls = []
    others = [name for names in BACKENDS.values() for name in names]
    for name in ("layer_norm_modulate", "gated_residual_layer_norm_modulate", *others):
        kernel = getattr(operations, name)
        monkeypatch.setattr(operations, name, lambda *a, kernel=kernel, name=name: calls.append(name) or kernel(*a))
    expected = truth(**forward_inputs(truth)).sample
    own = reference(**forward_inputs(reference, dtype=dtype)).sample
    with model.session(EngineSession(EngineConfig(), toy.scheduler())):
        output = model(**forward_inputs(model, dtype=dtype)).sample
    expected_calls = ["layer_norm_modulate", *BACKENDS[backend], "gated_residual_layer_norm_modulate"]
    assert calls == expected_calls * LAYERS
    error, own = (relative(o.float(), expected) for o in (output, own))
    if backend is AttentionBackend.TRITON:
        assert error <= 1.1 * own
    else:  # at least 30 dB of attention alone, to which the stream adds what has no noise
        assert own < error <= 10 ** (-30 / 20)
