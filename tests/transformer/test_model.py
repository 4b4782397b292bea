"""The fast transformer against diffusers' own, for every member of the family, in a generation and outside of one."""

import copy
import json

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from peft import LoraConfig

from cogvx_fast.transformer import FastCogVideoXTransformer3DModel
from tests import toy
from tests.generation import bound, fast_model, forward_inputs, plain, relative, run, session


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("variant", toy.VARIANTS)
def test_a_step_is_diffusers_step(variant, batch):
    reference = toy.transformer(variant)
    model = FastCogVideoXTransformer3DModel.adopt(reference)
    current = session(model)
    expected = plain(reference, current, batch=batch)
    output = run(model, current, batch=batch)
    assert current.ran.fast == 1
    assert output.shape == expected.shape and expected.std() > 1e-3
    assert relative(output, expected) < 1e-5


@pytest.mark.parametrize("variant", toy.VARIANTS)
@torch.no_grad()
def test_outside_of_a_generation_it_is_diffusers_bit_for_bit(variant):
    reference = toy.transformer(variant)
    model = FastCogVideoXTransformer3DModel.adopt(copy.deepcopy(reference))
    arguments, other = forward_inputs(reference), fast_model(variant, seed=1)
    expected = reference(**arguments).sample
    assert torch.equal(model(**arguments, return_dict=False)[0], expected)
    with session(other).active():  # somebody else's generation
        assert torch.equal(model(**arguments).sample, expected)
    run(model, session(model))
    assert torch.equal(model(**arguments).sample, expected)


@torch.no_grad()
def test_return_dict_is_as_in_diffusers():
    model = fast_model()
    arguments = forward_inputs(model)
    with session(model).active():
        (output,) = model(**arguments, return_dict=False)
        assert torch.equal(output, model(**arguments).sample)


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_other_sizes_than_the_checkpoints_own(variant):
    reference = toy.transformer(variant)
    model = FastCogVideoXTransformer3DModel.adopt(reference)
    current, size = session(model), {"height": 6, "width": 10}
    assert relative(run(model, current, **size), plain(reference, current, **size)) < 1e-5


@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
def test_bf16_error_is_no_larger_than_diffusers_own(variant):
    exact = toy.transformer(variant)
    reference = toy.transformer(variant).to(torch.bfloat16)
    model = FastCogVideoXTransformer3DModel.adopt(copy.deepcopy(reference))
    own, ours = [], []
    for seed in range(8):
        current, half = session(model), {"seed": seed, "dtype": torch.bfloat16}
        inputs = forward_inputs(exact, **half)
        wide = {k: v.float() if torch.is_tensor(v) and v.dtype == torch.bfloat16 else v for k, v in inputs.items()}
        with torch.no_grad():
            expected = exact(**wide | {"timestep": current.scheduler.timesteps[:1].expand(2)}).sample
        own.append(relative(plain(reference, current, **half), expected))
        ours.append(relative(run(model, current, **half), expected))
    assert 0 < sum(ours) <= 1.1 * sum(own)


def test_shares_every_weight_and_leaves_the_reference_working():
    reference = toy.transformer()
    arguments = forward_inputs(reference)
    before = reference(**arguments).sample
    model = FastCogVideoXTransformer3DModel.adopt(reference)
    run(model, session(model))
    assert {name: p.data_ptr() for name, p in model.state_dict().items()} == {
        name: p.data_ptr() for name, p in reference.state_dict().items()
    }
    assert torch.equal(reference(**arguments).sample, before)
    assert type(reference.transformer_blocks[0].attn1.processor).__name__ == "CogVideoXAttnProcessor2_0"


@torch.no_grad()
def test_saves_as_diffusers_own_class(tmp_path):
    model = fast_model("1.5-5b")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "CogVideoXTransformer3DModel"
    loaded = CogVideoXTransformer3DModel.from_pretrained(tmp_path)
    arguments = forward_inputs(model)
    assert torch.equal(model(**arguments).sample, loaded(**arguments).sample)
    ours = FastCogVideoXTransformer3DModel.from_pretrained(tmp_path)
    assert relative(run(ours, session(ours)), plain(loaded, session(ours))) < 1e-5


class Doubling(CogVideoXAttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        video, text = super().__call__(*args, **kwargs)
        return 2 * video, text


def test_a_processor_that_the_user_sets_is_used():
    reference = toy.transformer("5b")
    model = FastCogVideoXTransformer3DModel.adopt(reference)
    current = session(model)
    before = run(model, current)
    for each in (reference, model):
        each.set_attn_processor(Doubling())
    with current.active():
        assert relative(run(model, current), plain(reference, current)) < 1e-5
        assert not any(how.attends for how in bound(model, current))
    assert relative(run(model, current), before) > 1e-3
    reference.fuse_qkv_projections()
    adopted = FastCogVideoXTransformer3DModel.adopt(reference)
    assert relative(run(adopted, session(adopted)), before) < 1e-5


def test_a_processor_set_in_the_middle_of_a_generation_is_used():
    model = fast_model("5b")
    with (current := session(model)).active():
        before = run(model, current)
        model.set_attn_processor(Doubling())
        after = run(model, current)
        assert relative(after, plain(model, current)) < 1e-5 and relative(after, before) > 1e-3


class Boosting(CogVideoXAttnProcessor2_0):
    def __call__(self, *args, boost=1.0, **kwargs):
        video, text = super().__call__(*args, **kwargs)
        return boost * video, text


@torch.no_grad()
def test_attention_kwargs_reach_the_processor():
    reference, outputs = toy.transformer("5b"), []
    model = FastCogVideoXTransformer3DModel.adopt(reference)
    arguments = forward_inputs(reference)
    for boost in (1.0, 3.0):
        for each in (reference, model):
            each.set_attn_processor(Boosting())
        given = arguments | {"attention_kwargs": {"boost": boost}}
        expected = reference(**given).sample
        with session(model).active():
            outputs.append(model(**given).sample)
        assert relative(outputs[-1], expected) < 1e-5
    assert relative(*outputs) > 1e-3


def test_gradients_are_the_references_too():
    gradients = []
    for checkpointing in (None, False, True):
        reference = toy.transformer()
        model = reference if checkpointing is None else FastCogVideoXTransformer3DModel.adopt(reference)
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**forward_inputs(reference)).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in reference.named_parameters()})
    for name, expected in gradients[0].items():
        for other in gradients[1:]:
            assert torch.equal(other[name], expected), name


def test_training_inside_of_a_generation_is_diffusers_own():
    model = fast_model()
    arguments = forward_inputs(model)
    with (current := session(model)).active():
        model(**arguments).sample.square().mean().backward()
    assert (current.ran.steps, current.ran.fast) == (1, 0) and "gradients" in current.ran.why_diffusers
    assert all(p.grad is not None for p in model.transformer_blocks[0].attn1.parameters())


def test_autocast_inside_of_a_generation_is_diffusers_own():
    model = fast_model()
    arguments = forward_inputs(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**arguments).sample
        with (current := session(model)).active():
            assert torch.equal(model(**arguments).sample, expected)
    assert current.ran.fast == 0 and "torch.autocast('cpu')" in current.ran.why_diffusers


def test_lora_before_and_after_adoption():
    def add_lora(model):
        # A random B, so that the adapter does something.
        torch.manual_seed(5)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "norm1.linear"], init_lora_weights=False))

    reference, before, after = (toy.transformer(seed=3) for _ in range(3))
    without = plain(reference, session(reference))
    add_lora(reference)
    add_lora(before)
    before = FastCogVideoXTransformer3DModel.adopt(before)
    after = FastCogVideoXTransformer3DModel.adopt(after)
    add_lora(after)
    for scale in (1.0, 0.5):
        scaled = forward_inputs(reference) | {"attention_kwargs": {"scale": scale}}
        with torch.no_grad():
            expected = reference(**scaled).sample
            assert relative(without, expected) > 1e-2
            for model in (before, after):
                with (current := session(model)).active():
                    assert relative(model(**scaled).sample, expected) < 1e-5
                assert current.ran.fast == 1


def test_wrong_text_length_says_what_to_pass():
    model = fast_model()
    arguments = forward_inputs(model)
    arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"][:, :10]
    with torch.no_grad(), session(model).active(), pytest.raises(ValueError, match="max_sequence_length=16"):
        model(**arguments)


def test_learned_positions_say_which_size_they_are_for():
    model = fast_model("5b-i2v")
    with pytest.raises(ValueError, match="32x32 pixels, only"):
        run(model, session(model), height=6, width=4)


def test_sizes_that_patches_do_not_fill_are_explained():
    model = fast_model("5b")
    with pytest.raises(ValueError, match=r"latents of 5x4 do not fill patches of 2x2: .* of 16 pixels"):
        run(model, session(model), height=5)
    model = fast_model("1.5-5b")
    arguments = forward_inputs(model)
    arguments["hidden_states"] = arguments["hidden_states"][:, :3]
    with (
        torch.no_grad(),
        session(model).active(),
        pytest.raises(ValueError, match=r"3 latent frames do not fill patches of 2: .* pad them"),
    ):
        model(**arguments)
