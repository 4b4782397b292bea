"""The plan as data: complete, frozen, comparable."""

import dataclasses

import pytest
import torch

from cogvx_fast.attention import CAPABILITIES
from cogvx_fast.config import AttentionBackend, EngineConfig
from cogvx_fast.plan import AttentionPlan, EnginePlan, Offload, Product, VaePlan
from cogvx_fast.quantization import QuantizedAttention
from cogvx_fast.resolve import decide
from tests import generation
from tests.generation import fast_model, session

CPU = torch.device("cpu")


def made(**config):
    vae = VaePlan(CPU, torch.float32)
    return decide(EngineConfig(**config), device=CPU, dtype=torch.float32, head_dim=64, vae=vae)


def test_it_is_frozen_and_compares_by_what_it_says():
    assert made() == made() != made(fuse_projections=False)
    for part in (made(), made().attention, made().vae):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)


def test_choices_are_enumerated_and_none_is_open():
    for field in dataclasses.fields(EnginePlan):
        assert "None" not in field.type, field.name
    for kind in (Product, Offload):
        assert "auto" not in [member.value for member in kind], kind


@pytest.mark.parametrize(("operations", "chains"), [("torch", False), ("cpu", True), ("triton", True)])
def test_blocks_hand_on_their_last_addition_unless_in_torch(operations, chains):
    assert dataclasses.replace(made(), operations=operations).chains is chains


@pytest.mark.parametrize("backend", CAPABILITIES)
def test_attention_that_is_not_exact_may_overflow_and_has_an_exact_fallback(backend):
    exact = CAPABILITIES[backend].exact
    attention = AttentionPlan(backend, backend if exact else AttentionBackend.SDPA)
    assert attention.capability is CAPABILITIES[backend]
    assert attention.may_overflow is not exact
    assert attention.exact().backend is attention.fallback and not attention.exact().may_overflow
    assert attention.in_8_bits is (backend is AttentionBackend.TRITON_INT8)


def test_attention_in_words():
    value = QuantizedAttention(fp8_value=True)
    words = str(AttentionPlan(AttentionBackend.TRITON_INT8, AttentionBackend.SDPA, value, "not flash-attn-3: no"))
    assert words == "triton-int8: Q and K in int8, V in e4m3 (not flash-attn-3: no)"
    assert str(AttentionPlan(value=value)) == "sdpa"
    assert str(AttentionPlan(kernel="cuDNN's kernel", why="not amx: no")) == "sdpa: cuDNN's kernel (not amx: no)"


def test_a_session_keeps_the_very_plan():
    model = fast_model()
    given = generation.plan(model, {"merges": False})
    assert session(model, plan=given).plan is given
