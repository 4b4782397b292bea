"""A lossy attention that overflows: the step is redone exact, with one warning; an exact one is not looked at."""

import warnings

import pytest
import torch
from cogvx_kernels import ops

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.attention import CAPABILITIES, AttentionBackend, Capability
from tests import toy

LOSSY = EngineConfig(recipe="int8", attention="sage")


@pytest.fixture
def steps(monkeypatch):
    """Makes an attention that is ours, lossy, and overflows when told to: the calls of it, and the numbers of those
    that do."""
    calls, overflowing, real = [], set(), ops.attention

    def attention(query, key, value, scale=None, impl="torch"):
        calls.append(impl)
        output = real(query, key, value, scale, "torch")
        if len(calls) - 1 in overflowing:
            output[0, 0, 0, 0] = torch.inf
        return output

    monkeypatch.setattr(ops, "attention", attention)
    monkeypatch.setitem(CAPABILITIES, AttentionBackend.SAGE, Capability(None, exact=False, impl="overflows"))
    return calls, overflowing


def run(pipe):
    return pipe(**toy.inputs(num_steps=4, output_type="latent")).frames


def test_steps_that_overflow_are_redone_exact_and_warned_of_once(steps):
    calls, overflowing = steps
    fast = accelerate(toy.pipeline(), LOSSY)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        expected = run(fast)  # "overflows" computes what exact does until it is told to
    assert calls == ["overflows"] * 3 * 4 and torch.isfinite(expected).all()
    assert "redone" not in str(fast.engine_report())
    calls.clear()
    overflowing |= {1, 7}  # a block of the first and one of the third step
    with pytest.warns(RuntimeWarning, match="not finite: the step is redone exact") as caught:
        output = run(fast)
    assert len([warning for warning in caught if "redone" in str(warning.message)]) == 1
    assert calls == ["overflows"] * 3 * 4  # in the steps that were redone another attended
    assert torch.isfinite(output).all() and torch.allclose(output, expected, rtol=1e-4, atol=1e-5)
    assert "2 of 4 steps redone exact" in fast.engine_report().line("attention").detail


def test_hooked_attention_is_redone_exact_too(steps):
    calls, overflowing = steps
    fast = accelerate(toy.pipeline(), LOSSY)
    expected = run(fast)
    for block in fast.transformer.transformer_blocks:
        block.attn1.register_forward_hook(lambda *_: None)
    calls.clear()
    overflowing |= {1}
    with pytest.warns(RuntimeWarning, match="redone exact"):
        output = run(fast)
    assert calls == ["overflows"] * 3 * 4 and torch.allclose(output, expected, rtol=1e-4, atol=1e-5)


def test_an_exact_attention_is_not_looked_at(monkeypatch):
    looked = []
    monkeypatch.setattr(torch, "isfinite", lambda tensor: looked.append(tensor) or torch.tensor(True))
    for engine in ("exact", EngineConfig(recipe="int8")):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            run(accelerate(toy.pipeline(), engine))
    assert not looked
