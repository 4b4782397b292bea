"""A session by itself: who finds it, for how long, and which step a timestep is."""

import contextvars
import threading

import pytest
import torch
from torch import nn

from cogvx_fast.session import bound_to, current
from tests import toy
from tests.generation import bound, fast_model, plain, relative, run, session


@pytest.fixture
def model():
    return fast_model()


def test_it_is_found_by_its_own_models_while_it_is_entered(model):
    generation, vae = session(model), toy.vae()
    generation.vae = vae
    assert current(model) is None
    with generation.active() as entered:
        assert entered is generation is current(model) is current(vae)
        assert current(fast_model()) is None and current(nn.Linear(1, 1)) is None
        with (inner := session(model)).active():
            assert current(model) is inner
        assert current(model) is generation
    assert current(model) is None


def test_it_ends_even_when_the_loop_fails(model):
    generation = session(model)
    with pytest.raises(KeyboardInterrupt), generation.active():
        run(model, generation)
        assert generation.bindings
        raise KeyboardInterrupt
    assert current(model) is None and not generation.bindings


@torch.no_grad()
def test_compiling_a_whole_model_sees_none(model, monkeypatch):
    with (generation := session(model)).active():
        run(model, generation)
        block = model.transformer_blocks[0]
        assert bound_to(block) is bound_to(block.attn1) is generation.bindings[block]
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert current(model) is None and bound_to(block) is None


def test_other_threads_do_not_see_it(model):
    seen = []
    with session(model).active():
        thread = threading.Thread(target=lambda: seen.append(current(model)))
        thread.start()
        thread.join()
        contextvars.copy_context().run(lambda: seen.append(current(model)))  # a task of this one does
    assert seen[0] is None and seen[1] is not None


def test_threads_that_share_weights_have_generations_of_their_own():
    """Of two sizes and numbers of steps; the threads take turns at every step."""
    model, results, errors = fast_model("5b"), {}, []
    turns = threading.Barrier(2, timeout=60)
    sizes = {3: {"height": 4, "seed": 1}, 5: {"height": 8, "seed": 2}}

    def generate(num_steps):
        try:
            with (generation := session(model, num_steps)).active():
                outputs = []
                for step in range(3):
                    turns.wait()
                    outputs.append(run(model, generation, step, **sizes[num_steps]))
                turns.wait()
                results[num_steps] = outputs, generation.ran, bound(model, generation)
        except BaseException as error:
            errors.append(error)
            turns.abort()

    threads = [threading.Thread(target=generate, args=(num_steps,)) for num_steps in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for num_steps, (outputs, ran, _) in results.items():
        assert ran.fast == 3 and ran.counts["modulation"] == ran.counts["bindings"] == 1
        for step, output in enumerate(outputs):
            assert relative(output, plain(model, session(model, num_steps), step, **sizes[num_steps])) < 1e-5
    own = [{id(how) for how in bindings} for _, _, bindings in results.values()]
    assert not own[0] & own[1]


def test_steps_are_read_off_the_schedulers_timesteps(model):
    generation = session(model, 5)
    steps = generation.scheduler.timesteps
    assert [generation.step_of(t.expand(2)) for t in steps] == [0, 1, 2, 3, 4]
    assert generation.step_of(steps[3:4]) == 3
    for other in (
        steps[3].clone().expand(2),  # of the same value, and no view
        steps[:2],  # two different ones
        steps[3].expand(2).float(),
        torch.tensor(3),
        999,
        None,
    ):
        assert generation.step_of(other) is None
    generation.scheduler = None
    assert generation.step_of(steps[3].expand(2)) is None


def test_what_is_kept_is_forgotten_at_release(model):
    with (generation := session(model)).active():
        run(model, generation)
        generation.release()
        assert not generation.bindings and current(model) is generation
        assert relative(run(model, generation, 1), plain(model, generation, 1)) < 1e-5
    assert generation.ran.counts == {"modulation": 2, "text_projection": 2, "positions": 2, "bindings": 2}
