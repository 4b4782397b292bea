"""The fast transformer against diffusers' own, for every member of the family."""

import json

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cogvx_fast.transformer import FastCogVideoXTransformer3DModel
from tests import toy


def forward_inputs(model, batch=2, seed=0, dtype=torch.float32, height=4, width=4):
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    p_t = config.patch_size_t or 1
    frames = 3 + 3 % p_t
    tokens = frames // p_t * (height // 2) * (width // 2)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    arguments = {
        "hidden_states": randn(batch, frames, config.in_channels, height, width),
        "encoder_hidden_states": randn(batch, toy.TEXT_LENGTH, toy.TEXT_DIM),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
    }
    if config.use_rotary_positional_embeddings:
        angles = torch.rand(tokens, config.attention_head_dim // 2, generator=generator).repeat_interleave(2, 1) * 6
        arguments["image_rotary_emb"] = (angles.cos(), angles.sin())
    if config.ofs_embed_dim:
        arguments["ofs"] = torch.full((1,), 2.0)
    return arguments


def relative(output, expected):
    return ((output - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("variant", toy.VARIANTS)
@torch.no_grad()
def test_forward_is_diffusers_forward(variant, batch):
    reference = toy.transformer(variant)
    fast = FastCogVideoXTransformer3DModel.adopt(reference)
    arguments = forward_inputs(reference, batch)
    expected = reference(**arguments).sample
    output = fast(**arguments, return_dict=False)[0]
    assert output.shape == expected.shape and expected.std() > 1e-3
    assert relative(output, expected) < 1e-5


@pytest.mark.parametrize("variant", ["2b", "5b"])
@torch.no_grad()
def test_other_sizes_than_the_checkpoints_own(variant):
    reference = toy.transformer(variant)
    fast = FastCogVideoXTransformer3DModel.adopt(reference)
    arguments = forward_inputs(reference, height=6, width=10)
    assert relative(fast(**arguments).sample, reference(**arguments).sample) < 1e-5


@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
@torch.no_grad()
def test_bf16_error_is_no_larger_than_diffusers_own(variant):
    exact = toy.transformer(variant)
    reference = toy.transformer(variant).to(torch.bfloat16)
    fast = FastCogVideoXTransformer3DModel.adopt(reference)
    own, ours = [], []
    for seed in range(8):
        arguments = forward_inputs(exact, seed=seed, dtype=torch.bfloat16)
        wide = {k: v.float() if torch.is_tensor(v) and v.dtype == torch.bfloat16 else v for k, v in arguments.items()}
        expected = exact(**wide).sample
        own.append(relative(reference(**arguments).sample.float(), expected))
        ours.append(relative(fast(**arguments).sample.float(), expected))
    assert 0 < sum(ours) <= 1.1 * sum(own)


def test_shares_every_weight_and_leaves_the_reference_working():
    reference = toy.transformer()
    arguments = forward_inputs(reference)
    before = reference(**arguments).sample
    fast = FastCogVideoXTransformer3DModel.adopt(reference)
    fast(**arguments)
    assert {name: p.data_ptr() for name, p in fast.state_dict().items()} == {
        name: p.data_ptr() for name, p in reference.state_dict().items()
    }
    assert torch.equal(reference(**arguments).sample, before)
    assert type(reference.transformer_blocks[0].attn1.processor).__name__ == "CogVideoXAttnProcessor2_0"


def test_saves_as_diffusers_own_class(tmp_path):
    fast = FastCogVideoXTransformer3DModel.adopt(toy.transformer("1.5-5b"))
    fast.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "CogVideoXTransformer3DModel"
    loaded = CogVideoXTransformer3DModel.from_pretrained(tmp_path)
    arguments = forward_inputs(fast)
    with torch.no_grad():
        assert relative(fast(**arguments).sample, loaded(**arguments).sample) < 1e-5


@torch.no_grad()
def test_a_processor_that_the_user_sets_is_used():
    from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

    class Doubling(CogVideoXAttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            video, text = super().__call__(*args, **kwargs)
            return 2 * video, text

    reference, arguments = toy.transformer("5b"), forward_inputs(toy.transformer("5b"))
    fast = FastCogVideoXTransformer3DModel.adopt(reference)
    plain = fast(**arguments).sample
    for model in (reference, fast):
        model.set_attn_processor(Doubling())
    assert relative(fast(**arguments).sample, reference(**arguments).sample) < 1e-5
    assert relative(fast(**arguments).sample, plain) > 1e-3
    reference.fuse_qkv_projections()
    adopted = FastCogVideoXTransformer3DModel.adopt(reference)
    assert relative(adopted(**arguments).sample, plain) < 1e-5


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
            assert torch.allclose(other[name], expected, rtol=1e-3, atol=1e-6), name


@torch.no_grad()
def test_lora_before_and_after_adoption():
    from peft import LoraConfig

    def add_lora(model):
        # A random B, so that the adapter does something.
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "norm1.linear"], init_lora_weights=False))

    reference, before, after = (toy.transformer(seed=3) for _ in range(3))
    arguments = forward_inputs(reference)
    plain = reference(**arguments).sample
    torch.manual_seed(5)
    add_lora(reference)
    torch.manual_seed(5)
    add_lora(before)
    before = FastCogVideoXTransformer3DModel.adopt(before)
    after = FastCogVideoXTransformer3DModel.adopt(after)
    torch.manual_seed(5)
    add_lora(after)
    for scale in (1.0, 0.5):
        expected = reference(**arguments, attention_kwargs={"scale": scale}).sample
        assert relative(plain, expected) > 1e-2
        for fast in (before, after):
            assert relative(fast(**arguments, attention_kwargs={"scale": scale}).sample, expected) < 1e-5


def test_wrong_text_length_says_what_to_pass():
    fast = FastCogVideoXTransformer3DModel.adopt(toy.transformer())
    arguments = forward_inputs(fast)
    arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"][:, :10]
    with pytest.raises(ValueError, match="max_sequence_length=16"):
        fast(**arguments)


def test_learned_positions_say_which_size_they_are_for():
    fast = FastCogVideoXTransformer3DModel.adopt(toy.transformer("5b-i2v"))
    with pytest.raises(ValueError, match="32x32 pixels, only"):
        fast(**forward_inputs(fast, height=6, width=4))


@torch.no_grad()
def test_sizes_that_patches_do_not_fill_are_explained():
    model = FastCogVideoXTransformer3DModel.adopt(toy.transformer("5b"))
    with pytest.raises(ValueError, match=r"latents of 5x4 do not fill patches of 2x2: .* of 16 pixels"):
        model(**forward_inputs(model, height=5))
    model = FastCogVideoXTransformer3DModel.adopt(toy.transformer("1.5-5b"))
    arguments = forward_inputs(model)
    arguments["hidden_states"] = arguments["hidden_states"][:, :3]
    with pytest.raises(ValueError, match=r"3 latent frames do not fill patches of 2: .* pad them"):
        model(**arguments)
