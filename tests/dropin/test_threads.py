"""Several threads generate at once: a pipeline and a scheduler each on one set of weights, or one pipeline in turns."""

import threading

import pytest
import torch

from cogvx_fast import EngineConfig, accelerate
from tests import toy

from .generations import assert_differs, assert_same, latents, transformer_inputs

pytestmark = pytest.mark.slow

JOBS = (
    {"prompt": "a cat", "num_steps": 4, "seed": 0},
    {"prompt": "two dogs", "num_steps": 6, "seed": 1, "guidance_scale": 3.0},
    {"prompt": "a bird", "num_steps": 5, "seed": 2, "height": 48, "num_frames": 17},
)
CONFIGS = {
    "exact": EngineConfig(),
    "torch": EngineConfig(fuse_operations=False, fuse_projections=False, pack_weights=False),
    "int8": EngineConfig(recipe="int8"),
    "int8-weight": EngineConfig(recipe="int8-weight"),
}


def run(pipe, job, **overrides):
    job = {**job, **overrides}
    return latents(pipe, generator=torch.Generator().manual_seed(job.pop("seed")), **job)


class Meeting:
    """A callback that makes all threads wait for each other at every step that they have in common."""

    def __init__(self, parties, steps):
        self.barrier, self.steps = threading.Barrier(parties, timeout=20), steps

    def __call__(self, pipe, step, timestep, tensors):
        if step < self.steps:
            self.barrier.wait()
        return {}

    def abort(self):
        self.barrier.abort()


def at_once(calls, meeting=None):
    """Runs the calls in a thread each; their results, or the first exception."""
    results, errors = [None] * len(calls), []

    def work(index, call):
        try:
            results[index] = call()
        except Exception as error:
            errors.append(error)
            if meeting is not None:
                meeting.abort()

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    if errors:  # the first is the cause: a barrier that breaks is what the others see of it
        raise errors[0]
    return results


def sharing(kind, config, number):
    """Pipelines with one set of weights, made in the ways that users make them."""
    original = toy.pipeline()
    first = accelerate(original, config)
    if kind == "accelerated twice":
        pipes = [first, *(accelerate(original, config) for _ in range(number - 1))]
    elif kind == "accelerated again":
        pipes = [first, *(accelerate(first, config) for _ in range(number - 1))]
    else:
        parts = {**first.components}
        pipes = [first, *(type(first)(**parts, engine=config) for _ in range(number - 1))]
    for pipe in pipes:
        pipe.scheduler = toy.scheduler()
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        *(("exact", kind) for kind in ("accelerated twice", "accelerated again", "one transformer")),
        *((config, "one transformer") for config in ("torch", "int8", "int8-weight")),
        ("int8", "accelerated again"),
    ],
)
def test_pipelines_that_share_weights_generate_at_once(config, kind):
    alone = [run(accelerate(toy.pipeline(), CONFIGS[config]), job) for job in JOBS]
    assert_differs(alone[1], alone[0])
    pipes, meeting = sharing(kind, CONFIGS[config], len(JOBS)), Meeting(len(JOBS), 4)
    for _ in range(2):
        results = at_once(
            [
                lambda pipe=pipe, job=job: run(pipe, job, callback_on_step_end=meeting)
                for pipe, job in zip(pipes, JOBS, strict=True)
            ],
            meeting,
        )
        for result, expected in zip(results, alone, strict=True):
            assert_same(result, expected)
    for pipe, expected in zip(pipes, alone, strict=True):  # and nothing of another's is left behind
        assert_same(run(pipe, JOBS[pipes.index(pipe)]), expected)


def test_tiers_that_share_weights_generate_at_once():
    """An exact and a quantized pipeline of one original: neither takes the other's plans or attention."""
    configs = (CONFIGS["exact"], CONFIGS["int8"], EngineConfig(modulation_table=False, reuse_text_projection=False))
    alone = [run(accelerate(toy.pipeline(), config), JOBS[0]) for config in configs]
    original, meeting = toy.pipeline(), Meeting(3, 4)
    pipes = [accelerate(original, config) for config in configs]
    for pipe in pipes:
        pipe.scheduler = toy.scheduler()
    calls = [lambda pipe=pipe: run(pipe, JOBS[0], callback_on_step_end=meeting) for pipe in pipes]
    for result, expected in zip(at_once(calls, meeting), alone, strict=True):
        assert_same(result, expected)


@pytest.mark.parametrize("config", ["exact", "int8"])
def test_one_pipeline_called_by_two_threads_makes_the_second_wait(config):
    fast = accelerate(toy.pipeline(), CONFIGS[config])
    alone = [run(accelerate(toy.pipeline(), CONFIGS[config]), job) for job in JOBS[:2]]
    inside, seen = threading.Event(), []

    def slow(pipe, step, timestep, tensors):
        inside.set()
        seen.append(("first", step))
        threading.Event().wait(0.02)
        return {}

    def second():
        assert inside.wait(60)
        return run(fast, JOBS[1], callback_on_step_end=lambda pipe, step, *_: seen.append(("second", step)) or {})

    results = at_once([lambda: run(fast, JOBS[0], callback_on_step_end=slow), second])
    for result, expected in zip(results, alone, strict=True):
        assert_same(result, expected)
    assert [name for name, _ in seen] == ["first"] * 4 + ["second"] * 6


def test_a_generation_within_a_callback():
    """A preview made with the very pipeline: upstream, the inner call resets the scheduler, so it has its own here."""
    results = []
    for pipe in (toy.pipeline(), accelerate(toy.pipeline())):
        inner = []

        def preview(pipe, step, timestep, tensors, inner=inner):
            if step == 1:
                outer, kept = pipe.scheduler, (pipe._num_timesteps, pipe._guidance_scale)
                pipe.scheduler = toy.scheduler()
                inner.append(run(pipe, JOBS[1]))
                pipe.scheduler, pipe._interrupt = outer, False
                pipe._num_timesteps, pipe._guidance_scale = kept
            return {}

        outer = run(pipe, JOBS[0], callback_on_step_end=preview)
        results.append((outer, inner[0], run(pipe, JOBS[2])))
    for result, expected in zip(results[1], results[0], strict=True):
        assert_same(result, expected)


def test_other_pipelines_of_the_same_weights_within_a_callback():
    original = toy.pipeline()
    expected = [run(toy.pipeline(), job) for job in JOBS[:2]]
    fast, other = accelerate(original), accelerate(original)
    other.scheduler, inner = toy.scheduler(), []

    def preview(pipe, step, timestep, tensors):
        if step in (0, 2):
            inner.append(run(other, JOBS[1]))
        return {}

    assert_same(run(fast, JOBS[0], callback_on_step_end=preview), expected[0])
    assert len(inner) == 2
    for result in inner:
        assert_same(result, expected[1])


def test_a_generation_that_fails_leaves_nothing_behind():
    fast = accelerate(toy.pipeline())
    expected = run(toy.pipeline(), JOBS[1])

    def fail(pipe, step, timestep, tensors):
        raise InterruptedError("stop")

    with pytest.raises(InterruptedError):
        run(fast, JOBS[0], callback_on_step_end=fail)
    assert_same(run(fast, JOBS[1]), expected)
    results = at_once([lambda: run(fast, JOBS[1])])  # nor a lock that only the first thread could open
    assert_same(results[0], expected)


def test_a_direct_call_beside_a_generation():
    """Another thread calls the transformer itself: its own arguments' result, no constants."""
    original = toy.pipeline()
    arguments = transformer_inputs(original.transformer)
    with torch.no_grad():
        expected = original.transformer(**arguments).sample
    fast, direct = accelerate(original), []

    def call(pipe, step, timestep, tensors):
        def work():
            with torch.no_grad():
                return fast.transformer(**arguments).sample

        direct.extend(at_once([work]))
        return {}

    assert_same(run(fast, JOBS[0], callback_on_step_end=call), run(toy.pipeline(), JOBS[0]))
    assert len(direct) == 4
    for output in direct:
        assert_same(output, expected)


def test_two_threads_decode_at_once():
    original = toy.pipeline()
    shapes = [(1, 16, 3, 4, 4), (1, 16, 5, 6, 2)]
    codes = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    with torch.no_grad():
        expected = [original.vae.decode(z).sample for z in codes]
    vaes = [accelerate(original).vae for _ in codes]

    def work(vae, z):
        with torch.no_grad():
            return [vae.decode(z).sample for _ in range(3)]

    calls = [lambda vae=vae, z=z: work(vae, z) for vae, z in zip(vaes, codes, strict=True)]
    for outputs, want in zip(at_once(calls), expected, strict=True):
        for output in outputs:
            assert_same(output, want)
