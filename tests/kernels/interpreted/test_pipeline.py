"""A pipeline of recipe int8 as on a GPU, every operation of the transformer a Triton kernel, interpreted."""

import dataclasses
import warnings

import pytest
import torch

from cogvx_fast import EngineConfig, accelerate, generation
from cogvx_fast.config import AttentionBackend
from cogvx_fast.plan import AttentionPlan, Product
from cogvx_fast.quantization import QuantizedAttention
from tests import toy
from tests.kernels.triton_operations import MODULES, operation

STEPS, LAYERS = 2, 1


@pytest.fixture(autouse=True)
def outputs():
    """The plain allocator: diffusers' own code is among what runs here."""


@pytest.fixture
def on_gpu(monkeypatch):
    """What would be decided on a GPU, though the tensors are on the CPU: attention in 8 bits, redone by torch's own."""

    def resolve(config, *place):
        plan = decided(config, *place)
        attention = plan.attention
        if config.attention is AttentionBackend.AUTO:
            attention = AttentionPlan(AttentionBackend.TRITON_INT8, AttentionBackend.SDPA, attention.value)
        return dataclasses.replace(plan, operations="triton", product=Product.SCALED, attention=attention)

    decided = generation.resolve
    monkeypatch.setattr(generation, "resolve", resolve)


def pipeline(**config):
    pipe = toy.pipeline()
    pipe.transformer = toy.transformer(attention_head_dim=64, num_layers=LAYERS)
    return accelerate(pipe.to(torch.bfloat16), EngineConfig(recipe="int8", text_encoder="native", **config))


def run(pipe, steps=STEPS):
    return pipe(**toy.inputs(num_steps=steps, output_type="latent")).frames.float()


@pytest.fixture
def attention(monkeypatch):
    """The calls of the kernel, and the numbers of those whose V is to have an infinity."""
    calls, broken, kernel = [], set(), operation("int8_attention")

    def attend(query, query_scale, key, key_scale, value, *others):
        calls.append((value, *others))
        if len(calls) - 1 in broken:
            value = value.clone()
            value[0, 0, 0, 0] = torch.inf
        return kernel(query, query_scale, key, key_scale, value, *others)

    monkeypatch.setattr(MODULES["int8_attention"], "int8_attention", attend)
    return calls, broken


def test_a_step_in_which_attention_overflows_is_redone_exact(on_gpu, attention, monkeypatch):
    calls, broken = attention
    pipe, looked = pipeline(), []
    monkeypatch.setattr(torch, "isfinite", lambda tensor: looked.append(tensor))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        expected = run(pipe)
    # The kernels say so themselves, all into one number: nothing is read but that.
    assert len(calls) == STEPS * LAYERS and len({guard.data_ptr() for *_, guard, _ in calls}) == 1 and not looked
    assert "triton-int8: Q and K in int8, V in 16 bits" in str(pipe.engine_report())
    assert f"int8 products of our own in {LAYERS}" in str(pipe.engine_report())
    assert f"norms, gates and rotations in Triton in {LAYERS}" in str(pipe.engine_report())

    calls.clear()
    broken |= {LAYERS - 1, 2 * LAYERS - 1}  # in each step
    with pytest.warns(RuntimeWarning, match="not finite: the step is redone exact") as caught:
        output = run(pipe)
    assert len([warning for warning in caught if "redone" in str(warning.message)]) == 1
    assert f"{STEPS} of {STEPS} steps redone exact" in str(pipe.engine_report())
    assert len(calls) == STEPS * LAYERS  # the second step was in 8 bits again
    exact = run(pipeline(attention="sdpa"))
    assert len(calls) == STEPS * LAYERS and torch.equal(output, exact) and not torch.equal(expected, exact)


def test_how_v_is_treated_can_be_chosen(on_gpu, attention):
    calls, _ = attention
    run(pipeline(quantized_attention=QuantizedAttention(fp8_value=True, smooth_value=True)), steps=1)
    assert {(value.dtype, scale.dtype, mean.dtype) for value, scale, mean, *_ in calls} == {
        (torch.float8_e4m3fn, torch.float32, torch.float32)
    }
