"""After a generation the report says what ran, not what was meant to."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from cogvx_fast import EngineConfig, accelerate
from tests import toy

from .generations import CPU, assert_same, frames, latents, line, transformer_inputs

OURS = ("adopt blocks", "modulation table", "text projection", "projections")


def statement(pipe):
    return {each.name: (each.applied, each.detail) for each in pipe.engine_report().lines}


def assert_not_said_to_run(pipe, *names):
    for name in names or OURS:
        each = line(pipe, name)
        assert not each.applied, f"'{name}' is said to be on: {each.detail}"
        assert each.detail


def test_what_ran_is_said_to_be_on():
    """Guards the rest: where nothing stands in the way, all of it is on."""
    fast = accelerate(toy.pipeline())
    frames(fast)
    assert all(line(fast, name).applied for name in (*OURS, "attention", "vae"))


def test_a_forward_of_the_users_own():
    fast = accelerate(toy.pipeline())
    reference = toy.transformer()
    fast.transformer.forward = reference.forward
    assert_same(latents(fast), latents(toy.pipeline()))
    assert_not_said_to_run(fast)
    del fast.transformer.forward
    latents(fast)
    assert line(fast, "modulation table").applied  # and it is on again when it runs again


def test_a_model_that_answers_in_our_place():
    """A wrapper that computes elsewhere: a server's client, another library's engine."""

    class Remote(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config, self.dtype, self.device = model, model.config, torch.float32, CPU

        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs)

        def cache_context(self, name):
            return self.model.cache_context(name)

    fast = accelerate(toy.pipeline())
    fast.transformer = Remote(toy.transformer())
    try:
        output = latents(fast)
    except (TypeError, ValueError) as error:
        assert "transformer" in str(error) and "Remote" in str(error)
        return
    assert_same(output, latents(toy.pipeline()))
    assert_not_said_to_run(fast)


def test_blocks_that_another_library_replaced():
    """What cache-dit does: the list of blocks is one module that calls them as diffusers would."""

    class Together(torch.nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.blocks = blocks

        def forward(self, hidden_states, encoder_hidden_states, *args, **kwargs):
            for block in self.blocks:
                hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states, *args, **kwargs)
            return hidden_states, encoder_hidden_states

    fast = accelerate(toy.pipeline())
    fast.transformer.transformer_blocks = torch.nn.ModuleList([Together(toy.transformer().transformer_blocks)])
    try:
        output = latents(fast)
    except (TypeError, ValueError) as error:
        assert "block" in str(error) and "Together" in str(error)
        return
    assert_same(output, latents(toy.pipeline()))
    assert_not_said_to_run(fast, "projections")


def test_a_hook_that_never_lets_the_forward_run():
    """accelerate's hooks can put any function in the place of a model's forward."""

    class Answer(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            module._old_forward = lambda *args, **kwargs: (kwargs["hidden_states"] * 0.5,)
            return args, kwargs

    fast = accelerate(toy.pipeline())
    add_hook_to_module(fast.transformer, Answer())
    latents(fast)
    assert_not_said_to_run(fast)


def test_hooks_that_force_modules_to_be_called():
    """With hooks everywhere projections are not merged: the report says so, and names the reason."""
    fast = accelerate(toy.pipeline())
    handles = [block.attn1.to_q.register_forward_hook(lambda *_: None) for block in fast.transformer.transformer_blocks]
    latents(fast)
    assert "0 of 3" in line(fast, "projections").detail or not line(fast, "projections").applied
    assert "hook" in line(fast, "projections").detail
    for handle in handles:
        handle.remove()
    latents(fast)
    assert "3 of 3" in line(fast, "projections").detail


def test_training_mode_and_gradients_say_nothing_of_the_past():
    """A forward pass outside of a generation is none: it changes nothing in the report."""
    fast = accelerate(toy.pipeline())
    latents(fast)
    before = statement(fast)
    fast.transformer(**transformer_inputs(fast.transformer)).sample.sum().backward()
    assert statement(fast) == before


@pytest.mark.parametrize("switch", ["modulation_table", "reuse_text_projection"])
def test_what_is_off_stays_off(switch):
    fast = accelerate(toy.pipeline(), EngineConfig(**{switch: False}))
    latents(fast)
    name = {"modulation_table": "modulation table", "reuse_text_projection": "text projection"}[switch]
    assert not line(fast, name).applied and switch in line(fast, name).detail


def test_a_scheduler_whose_steps_are_not_the_tables():
    """A scheduler that hands out timesteps of its own making: the table cannot be looked up, and the report says so."""

    class Copies:
        """`timesteps` that are new tensors at every access."""

        def __init__(self, scheduler):
            self.__dict__["scheduler"] = scheduler

        def __getattr__(self, name):
            value = getattr(self.scheduler, name)
            return value.clone() if name == "timesteps" else value

    results = []
    for pipe in (toy.pipeline(), accelerate(toy.pipeline())):
        pipe.scheduler = Copies(pipe.scheduler)
        results.append(latents(pipe))
    assert_same(results[1], results[0])


def test_an_autoencoder_that_was_not_ours():
    from diffusers import AutoencoderKLCogVideoX

    fast = accelerate(toy.pipeline())
    fast.vae.enable_tiling()
    frames(fast, height=48, width=48)
    assert "tiling" in line(fast, "vae").detail
    fast.vae.disable_tiling()
    fast.vae.decode = AutoencoderKLCogVideoX.decode.__get__(fast.vae)
    assert_same(frames(fast), frames(toy.pipeline()))
    assert not line(fast, "vae").applied or "decode" in line(fast, "vae").detail.split(";")[0]
