"""What is computed once a generation, and when it is computed again."""

import torch

from cogvx_fast import EngineConfig
from cogvx_fast.transformer import EngineSession, FastCogVideoXTransformer3DModel
from tests import toy

from .test_model import forward_inputs, relative


def fast_model(variant="2b"):
    return FastCogVideoXTransformer3DModel.adopt(toy.transformer(variant))


def session(num_steps=5, **config):
    scheduler = toy.scheduler()
    scheduler.set_timesteps(num_steps)
    return EngineSession(EngineConfig(**config), scheduler)


@torch.no_grad()
def run_loop(model, current, arguments):
    outputs = []
    with model.session(current):
        for t in current.scheduler.timesteps:
            arguments["timestep"] = t.expand(arguments["hidden_states"].shape[0])
            outputs.append(model(**arguments).sample)
    return outputs


def test_constants_are_computed_once_and_change_nothing():
    for variant in ("2b", "1.5-5b-i2v"):
        model = fast_model(variant)
        arguments = forward_inputs(model)
        current = session()
        inside = run_loop(model, current, arguments)
        positions = 1 if variant == "2b" else 0
        assert current.counts == {"modulation": 1, "text_projection": 1, "positions": positions, "plans": 1}
        for output, t in zip(inside, current.scheduler.timesteps, strict=True):
            arguments["timestep"] = t.expand(2)
            with torch.no_grad():
                assert relative(output, model(**arguments).sample) < 1e-5


def test_the_table_is_right_for_the_last_step_too():
    # A table indexed by the wrong row would still be finite: compare the rows themselves.
    model = fast_model()
    current = session(7)
    rows = []
    original = type(current).modulation

    def spy(self, timestep, ofs, compute):
        modulation = original(self, timestep, ofs, compute)
        rows.append((modulation, compute(timestep[:1])))
        return modulation

    current.modulation = spy.__get__(current)
    run_loop(model, current, forward_inputs(model))
    assert len(rows) == 7
    for table, direct in rows:
        for pair, expected in zip(table.blocks, direct.blocks, strict=True):
            for norm, norm_expected in zip(pair, expected, strict=True):
                assert torch.allclose(norm.shift, norm_expected.shift, atol=1e-5)
                assert torch.allclose(norm.gate, norm_expected.gate, atol=1e-5)
        assert torch.allclose(table.final_scale, direct.final_scale, atol=1e-5)


def test_switches_switch_it_off():
    model = fast_model()
    current = session(modulation_table=False, reuse_text_projection=False)
    run_loop(model, current, forward_inputs(model))
    assert current.counts["modulation"] == 0 and current.counts["text_projection"] == 0


@torch.no_grad()
def test_a_timestep_of_ones_own_is_computed_directly():
    model = fast_model()
    arguments = forward_inputs(model)
    arguments["timestep"] = torch.tensor([3, 900])  # not of the scheduler's, and different in the batch
    expected = model(**arguments).sample
    current = session()
    with model.session(current):
        assert relative(model(**arguments).sample, expected) < 1e-5  # same numbers; products are merged and packed
    assert current.counts["modulation"] == 0


@torch.no_grad()
def test_changed_embeddings_are_projected_again():
    model = fast_model()
    arguments = forward_inputs(model)
    current = session()
    with model.session(current):
        first = model(**arguments).sample
        arguments["encoder_hidden_states"].mul_(0.5)  # in place: the same tensor, other values
        second = model(**arguments).sample
        arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"] + 1
        third = model(**arguments).sample
    assert current.counts["text_projection"] == 3
    assert relative(first, second) > 1e-3 and relative(second, third) > 1e-3
    assert relative(third, model(**arguments).sample) < 1e-5


@torch.no_grad()
def test_new_timesteps_make_a_new_table():
    model = fast_model()
    arguments = forward_inputs(model)
    current = session(4)
    run_loop(model, current, arguments)
    current.scheduler.set_timesteps(6)
    outputs = run_loop(model, current, arguments)
    assert current.counts["modulation"] == 2
    arguments["timestep"] = current.scheduler.timesteps[-1].expand(2)
    assert relative(outputs[-1], model(**arguments).sample) < 1e-5


def test_a_session_ends_even_when_the_loop_fails():
    model = fast_model()
    try:
        with model.session(session()):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert model._session is None
