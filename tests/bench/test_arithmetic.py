import dataclasses

import pytest
import torch
from torch import nn

from cogvx_fast.bench.arithmetic import _packed, arithmetic_call, block_linears
from cogvx_fast.bench.models import build_pipeline
from cogvx_fast.bench.stages import shapes


@torch.no_grad()
def test_runs_the_linears_of_the_step_on_its_shapes(toy_step):
    pipe = build_pipeline(toy_step, torch.float32, torch.device("cpu"))
    linears = [linear for block in pipe.transformer.transformer_blocks for linear in block_linears(block)]
    seen = []
    for linear in [*linears, pipe.transformer.proj_out]:
        linear.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs[0].shape[0])))
    attention = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value):
        attention.append(query.shape)
        return original(query, key, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        arithmetic_call(pipe, toy_step)(0)
        size = shapes(toy_step, pipe)
        rows = 2 * size["tokens"]
        assert seen == [*((linear, rows) for linear in linears), (pipe.transformer.proj_out, 2 * size["video_tokens"])]
        assert attention == [(2, size["heads"], size["tokens"], size["head_dim"])] * size["layers"]
        seen.clear()
        arithmetic_call(pipe, toy_step, linears=False)(0)
        assert seen == [] and len(attention) == 2 * size["layers"]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_weights_compute_the_same(dtype):
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bf16 on this CPU")
    linear, x = nn.Linear(48, 32).to(dtype), torch.randn(20, 48).to(dtype)
    difference = (_packed(linear, 20)(x).float() - linear(x).float()).abs().max()
    assert difference <= 4 * torch.finfo(dtype).eps * linear(x).float().abs().max()


def test_work_counts_what_is_run(toy_step):
    from cogvx_fast.bench.contenders import CONTENDERS

    pipe = build_pipeline(dataclasses.replace(toy_step), torch.float32, torch.device("cpu"))
    whole = CONTENDERS["arithmetic"].build(pipe, toy_step, "dit-step").extras
    part = CONTENDERS["attention"].build(pipe, toy_step, "dit-step").extras
    assert set(whole) == {"linear_flop", "attention_flop"} and set(part) == {"attention_flop"}
