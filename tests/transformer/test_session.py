"""What is computed once a generation, and when it is computed again."""

import pytest
import torch

from tests.generation import fast_model, forward_inputs, outside, plain, relative, session


@torch.no_grad()
def run_loop(model, current, arguments):
    """Every step of a generation that is entered."""
    outputs = []
    for t in current.scheduler.timesteps:
        arguments["timestep"] = t.expand(arguments["hidden_states"].shape[0])
        outputs.append(model(**arguments).sample)
    return outputs


@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
def test_constants_are_computed_once_and_change_nothing(variant):
    model = fast_model(variant)
    arguments = forward_inputs(model)
    with (current := session(model)).active():
        inside = run_loop(model, current, arguments)
    positions = 1 if variant == "2b" else 0
    expected = {"modulation": 1, "text_projection": 1, "positions": positions, "bindings": 1}
    assert current.ran.counts == expected and current.ran.fast == current.ran.steps == 5
    for step, output in enumerate(inside):
        assert relative(output, plain(model, current, step)) < 1e-5


def test_the_table_is_right_for_the_last_step_too(monkeypatch):
    # A table indexed by the wrong row would still be finite: compare the rows themselves.
    model = fast_model()
    current, rows = session(model, 7), []
    original = type(current).modulation

    def spy(self, step, ofs, modules, compute):
        row = original(self, step, ofs, modules, compute)
        rows.append((row, compute(self.scheduler.timesteps[step : step + 1])))
        return row

    monkeypatch.setattr(type(current), "modulation", spy)
    with current.active():
        run_loop(model, current, forward_inputs(model))
    assert len(rows) == 7
    for table, direct in rows:
        for pair, expected in zip(table.blocks, direct.blocks, strict=True):
            for norm, norm_expected in zip(pair, expected, strict=True):
                assert torch.allclose(norm.shift, norm_expected.shift, atol=1e-5)
                assert torch.allclose(norm.scale, norm_expected.scale, atol=1e-5)
                assert torch.allclose(norm.gate, norm_expected.gate, atol=1e-5)
        assert torch.allclose(table.final_scale, direct.final_scale, atol=1e-5)
        assert torch.allclose(table.final_shift, direct.final_shift, atol=1e-5)


def test_switches_switch_it_off():
    model = fast_model()
    with (current := session(model, modulation_table=False, reuse_text_projection=False)).active():
        outputs = run_loop(model, current, forward_inputs(model))
    assert current.ran.counts["modulation"] == current.ran.counts["text_projection"] == 0
    assert relative(outputs[-1], plain(model, current, 4)) < 1e-5


@torch.no_grad()
def test_a_timestep_of_ones_own_is_computed_directly():
    model = fast_model()
    arguments = forward_inputs(model)
    arguments["timestep"] = torch.tensor([3, 900])  # not of the scheduler's, and different in the batch
    expected = model(**arguments).sample
    with (current := session(model)).active():
        assert relative(model(**arguments).sample, expected) < 1e-5
    assert current.ran.counts["modulation"] == 0 and current.ran.fast == 1


@torch.no_grad()
@pytest.mark.parametrize("watched", [True, False])
def test_changed_embeddings_are_projected_again(watched):
    model = fast_model()
    arguments = forward_inputs(model)
    outputs = []
    with (current := session(model, watched=watched)).active():
        outputs.append(model(**arguments).sample)
        arguments["encoder_hidden_states"].mul_(0.5)  # in place: the same tensor, other values
        outputs.append(model(**arguments).sample)
        arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"] + 1
        outputs.append(model(**arguments).sample)
        model(**arguments)
    assert current.ran.counts["text_projection"] == 3
    assert relative(*outputs[:2]) > 1e-3 and relative(*outputs[1:]) > 1e-3
    assert relative(outputs[2], model(**arguments).sample) < 1e-5


def test_embeddings_made_in_inference_mode_are_watched_by_their_numbers():
    model = fast_model()
    with torch.inference_mode():
        arguments = forward_inputs(model)
        with (current := session(model)).active():
            for _ in range(2):
                model(**arguments)
            arguments["encoder_hidden_states"].mul_(0.5)  # which torch does not count
            output = model(**arguments).sample
        assert current.ran.counts["text_projection"] == 2
        assert relative(output, model(**arguments).sample) < 1e-5


@torch.no_grad()
def test_new_timesteps_make_a_new_table():
    model = fast_model()
    arguments = forward_inputs(model)
    with (current := session(model, 4)).active():
        run_loop(model, current, arguments)
        current.scheduler.set_timesteps(6)
        outputs = run_loop(model, current, arguments)
    assert current.ran.counts["modulation"] == 2
    assert relative(outputs[-1], plain(model, current, 5)) < 1e-5


@torch.no_grad()
def test_weights_of_the_norms_that_change_make_a_new_table():
    model = fast_model()
    arguments = forward_inputs(model)
    with (current := session(model, 4)).active():
        run_loop(model, current, arguments)
        model.transformer_blocks[1].norm2.linear.bias.add_(0.5)
        outputs = run_loop(model, current, arguments)
    assert current.ran.counts["modulation"] == 2
    assert relative(outputs[-1], plain(model, current, 3)) < 1e-5


@torch.no_grad()
def test_positions_follow_the_size_and_the_models_own_table():
    model = fast_model()
    with (current := session(model)).active():
        for height in (4, 6, 4):
            arguments = forward_inputs(model, height=height)
            assert relative(model(**arguments).sample, outside(model, arguments)) < 1e-5
        assert current.ran.counts["positions"] == 2
        model.patch_embed.pos_embedding.mul_(2)
        assert relative(model(**arguments).sample, outside(model, arguments)) < 1e-5
    assert current.ran.counts["positions"] == 3
