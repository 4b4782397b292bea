"""The methods that skip steps: each takes the evaluations that it says, and computes what its rule says."""

import contextlib

import pytest
import torch

from benchmarks.quality import prompts
from benchmarks.quality.methods import DIFFUSERS, METHODS, REFERENCES, Job, Unreachable, magcache, teacache
from benchmarks.quality.methods.periodic import even_steps, extrapolated
from benchmarks.quality.methods.stack import nearest_threshold, residual_reused
from benchmarks.quality.runs import Runs
from benchmarks.quality.setting import Setting
from cogvx_fast import demo_checkpoint
from tests import toy

STEPS = 12
# The work of a block of the demo checkpoint: 546 tokens of 256 channels, four times as many inside the feed-forward.
ATTENTION, FEED_FORWARD = 4 * 546 * 256**2 + 2 * 546**2 * 256, 8 * 546 * 256**2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The demo checkpoint, one clip of 12 steps."""
    first = prompts.chosen(None, True).first(1)
    # Not in bf16, which CPUs without units for it take minutes for.
    setting = Setting(demo_checkpoint(), "demo", first, dtype="float32", steps=STEPS)
    return Runs(setting, tmp_path_factory.mktemp("work"))


@contextlib.contextmanager
def counted(pipe):
    """How many samples went through attention and feed-forward of every block, seen at their last linears."""
    samples = {"attention": 0, "feed-forward": 0}
    with contextlib.ExitStack() as hooks:
        for block in pipe.transformer.transformer_blocks:
            for part, linear in (("attention", block.attn1.to_out[0]), ("feed-forward", block.ff.net[2])):

                def add(module, args, part=part):
                    samples[part] += args[0].shape[0]

                hooks.callback(linear.register_forward_pre_hook(add).remove)
        yield samples


def evaluations(pipe, samples):
    whole = 2 * len(pipe.transformer.transformer_blocks)  # both halves of guidance
    done = samples["attention"] * ATTENTION + samples["feed-forward"] * FEED_FORWARD
    return done / (whole * (ATTENTION + FEED_FORWARD))


# What parts of a step cannot come down to 7 of 12.
ASKED = {"Pyramid Attention Broadcast (diffusers)": 9, "FasterCache (diffusers)": 9}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_generation_takes_the_evaluations_that_are_stated(name, runs):
    method, asked = METHODS[name], ASKED.get(name, 7)
    pipe, job = runs.pipeline(method.base), runs.job(asked)
    parameters = method.find(pipe, job)
    before = pipe.transformer.forward
    with method.count(pipe) as counter, method.apply(pipe, job, parameters) as ready, counted(pipe) as samples:
        frames = runs._generate(ready.pipe, range(1), ready.arguments)
    assert counter.evaluations == pytest.approx(evaluations(pipe, samples))
    away = 1.0 if method.base == DIFFUSERS and "Seer" not in name else 0.0
    assert counter.evaluations == pytest.approx(asked, abs=away + 1e-6)
    assert frames.shape == (1, 17, 3, 128, 128) and frames.isfinite().all()
    # And everything is as it was: all steps are computed again.
    assert pipe.transformer.forward == before and not pipe.transformer.is_cache_enabled
    reference = REFERENCES[method.base]
    with reference.count(pipe) as counter, reference.apply(pipe, job, {}) as ready:
        runs._generate(pipe, range(1), {**ready.arguments, "output_type": "latent"})
    assert counter.evaluations == STEPS


@pytest.mark.parametrize("name", ["Pyramid Attention Broadcast (diffusers)", "FasterCache (diffusers)"])
def test_what_cannot_be_reached_says_why(name, runs):
    method = METHODS[name]
    with pytest.raises(Unreachable, match=rf"{name[:6]}.* cannot be brought to 3 evaluations of 12: the nearest is"):
        method.find(runs.pipeline(method.base), runs.job(3))
    first = METHODS["first block cache (diffusers)"]
    with pytest.raises(Unreachable, match=r"one of 6 blocks at every step .* at least 9\.2 evaluations of 50"):
        first.find(runs.pipeline(first.base), Job(4, 50, None, None))


def test_even_steps_are_as_many_as_asked():
    for steps in (12, 50, 51):
        for count in range(4, steps + 1):
            found = even_steps(count, steps)
            assert len(found) == count and found == sorted(set(found)), count
            assert found[0] == 0 and found[-1] == steps - 1
    gaps = [b - a for a, b in zip(even_steps(17, 50), even_steps(17, 50)[1:], strict=False)]
    assert gaps[:4] == [1] * 4 and gaps[-2:] == [1] * 2 and set(gaps[4:-2]) <= {4, 5}


@pytest.mark.parametrize("order", [0, 1, 2])
def test_extrapolation_is_exact_for_polynomials_of_its_order(order):
    weights = torch.randn(order + 1, 3, generator=torch.Generator().manual_seed(0))

    def value(step):
        return sum(weight * step**power for power, weight in enumerate(weights))

    kept = [(step, value(step)) for step in (4, 7, 12)[: order + 1]]
    torch.testing.assert_close(extrapolated(kept, 15), value(15), rtol=1e-4, atol=1e-3)


def test_teacaches_sum_starts_again_at_a_computed_step():
    # 0.2 is passed at step 3 (0.1 + 0.08 + 0.05); then 0.05 + 0.1 is not enough before the last, which is computed.
    assert teacache.computed_steps([0, 0.1, 0.08, 0.05, 0.05, 0.1, 0], 0.2) == [0, 3, 6]
    assert teacache.computed_steps([0.0] + [0.1] * 9, 0.0) == list(range(10))
    kinds = [teacache.kind(toy.transformer(variant).config) for variant in ("2b", "5b", "1.5-5b")]
    assert kinds == ["2b", "5b", "1.5-5b"]


# Published for CogVideoX-2b and 50 steps (github.com/yiming-l21/RA-CFGCache).
RATIOS = """
1.0 .89458 1.00006 1.00888 1.00483 .99040 .99130 .99701 .99563 .98938 .98848 .98701 .98980 .98612 .99031
.98242 .98905 .99057 .98669 .98657 .98902 .98704 .98678 .98829 .98109 .98958 .98842 .98507 .98820 .98782
.98659 .98627 .99017 .98601 .98520 .98829 .98760 .98483 .98498 .98472 .98536 .98306 .98471 .98121 .98055
.97642 .97472 .97195 .97018 .96159
"""


def test_magcaches_rule_on_published_ratios():
    ratios = [float(ratio) for ratio in RATIOS.split()]
    expected = [0, 1, 2, 3, 4, 9, 13, 17, 21, 24, 28, 32, 35, 38, 41, 44, 47, 49]
    assert magcache.computed_steps(ratios, 0.08) == expected
    threshold = nearest_threshold(lambda limit: len(magcache.computed_steps(ratios, limit)), 12, 2500.0)
    assert len(magcache.computed_steps(ratios, threshold)) == 12


@pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5b"])
@torch.no_grad()
def test_a_skipped_step_of_equal_inputs_gives_the_computed_output(variant):
    """The residual and what follows the blocks, against the model's own pass."""
    pipe = toy.pipeline(variant)
    seen = []
    transformer, call = pipe.transformer, pipe.transformer.forward

    def watch(**kwargs):
        seen.append(kwargs)
        return call(**kwargs)

    transformer.forward = watch
    pipe("a", num_inference_steps=2, output_type="latent", max_sequence_length=toy.TEXT_LENGTH)
    del transformer.forward
    given, calls = seen[0], []
    hook = transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with residual_reused(transformer, {0}):
        computed, skipped = (transformer(**given)[0] for _ in range(2))
    hook.remove()
    assert len(calls) == 1
    torch.testing.assert_close(computed, transformer(**given)[0])
    torch.testing.assert_close(skipped, computed, rtol=1e-4, atol=1e-4)
