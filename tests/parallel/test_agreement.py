"""What processes must have in common: where they have not, all of them hear of it."""

import numpy as np
import pytest

from . import jobs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "generator"),
        ({"prompt": "a dog"}, "prompt"),
        ({"num_inference_steps": 4}, "num_inference_steps"),
        ({"latents": 1}, "latents"),
        ({"preview": True}, "preview"),
    ],
)
def test_different_calls_are_refused_by_all(processes, changes, named):
    said = processes.run(2, jobs.differing_calls, changes)
    assert said[0] == said[1] and f"different arguments: {named};" in said[0]


def test_a_call_without_a_generator_draws_as_the_first(processes):
    made = processes.run(3, jobs.clip_without_a_generator)
    assert all((other == made[0]).all() for other in made)
    assert np.abs(processes.run(3, jobs.clip_without_a_generator, seed=1)[0] - made[0]).max() > 0.1


def test_the_prompt_is_encoded_by_the_first(processes):
    """The others need no text encoder."""
    (alone,) = processes.run(1, jobs.clip, None)
    made = processes.run(2, jobs.clip_with_one_text_encoder)
    assert np.abs(made[0] - alone[0]).max() < 1e-4 and (made[0] == made[1]).all()


def test_what_fails_at_the_first_fails_at_all(processes):
    said = processes.run(2, jobs.failing_text_encoder)
    assert said == ["OSError: no prompt today", "RuntimeError: the first process has failed: no prompt today"]


def test_degrees_that_cannot_be(processes):
    said = processes.run(2, jobs.impossible_degrees)
    assert said[0] == said[1]
    assert "guidance=2 * ulysses=2 * ring=1 = 4 must be the number of processes, which is 2" in said[0][0]
    assert "ulysses=2 must divide the transformer's 3 heads: 1, 3" in said[0][1]
    assert "'triton' cannot work with ParallelConfig.ring" in said[0][2]
