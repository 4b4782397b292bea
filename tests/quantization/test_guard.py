"""A lossy attention that overflows: the step is redone exact, with one warning; an exact one is not looked at."""

import dataclasses
import warnings

import pytest
import torch
from cogvx_kernels import ops

from cogvx_fast import EngineConfig, accelerate, lowering
from cogvx_fast.attention.backends import Capability, Resolution
from tests import toy


@dataclasses.dataclass(frozen=True)
class Injected(Resolution):
    """The choice of an attention that is ours, lossy, and overflows when told to."""

    @property
    def capability(self):
        return Capability(None, exact=False, impl="overflows")


@pytest.fixture
def steps(monkeypatch):
    """Makes attention lossy; what it returns holds the numbers of the calls that overflow, and is filled by calls."""
    calls, overflowing, real, resolve = [], set(), ops.attention, lowering.resolve

    def attention(query, key, value, scale=None, impl="torch"):
        calls.append(impl)
        output = real(query, key, value, scale, "torch")
        if impl == "overflows" and calls.count("overflows") - 1 in overflowing:
            output[0, 0, 0, 0] = torch.inf
        return output

    def choose(requested, *arguments, exact=True, **keywords):
        chosen = resolve(requested, *arguments, exact=exact, **keywords)
        return chosen if exact else Injected(chosen.backend)

    monkeypatch.setattr(ops, "attention", attention)
    monkeypatch.setattr(lowering, "resolve", choose)
    return calls, overflowing


def run(pipe):
    return pipe(**toy.inputs(num_steps=4, output_type="latent")).frames


def test_steps_that_overflow_are_redone_exact_and_warned_of_once(steps):
    calls, overflowing = steps
    fast = accelerate(toy.pipeline(), EngineConfig(recipe="int8"))
    expected = run(fast)  # "overflows" computes what exact does until it is told to
    assert calls == ["overflows"] * 3 * 4 and torch.isfinite(expected).all()
    calls.clear()
    overflowing |= {1, 7}  # a block of the first and one of the third step
    with pytest.warns(RuntimeWarning, match="not finite: the step is redone exact") as caught:
        output = run(fast)
    assert len([warning for warning in caught if "redone" in str(warning.message)]) == 1
    assert calls.count("overflows") == 3 * 4
    assert torch.isfinite(output).all() and torch.allclose(output, expected, rtol=1e-4, atol=1e-5)
    assert all(p.backend.impl == "overflows" for p in fast.transformer.joint_processors)


def test_an_exact_attention_is_not_looked_at(monkeypatch):
    looked = []
    monkeypatch.setattr(torch, "isfinite", lambda tensor: looked.append(tensor) or torch.tensor(True))
    for engine in ("exact", EngineConfig(recipe="int8")):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            run(accelerate(toy.pipeline(), engine))
    assert not looked
