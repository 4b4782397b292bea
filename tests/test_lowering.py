"""What is done to a pipeline when it is made, and to models that are put in later."""

import diffusers
import pytest
import torch
from cogvx_kernels.conv3d import direct as convolution

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.transformer import FastCogVideoXTransformer3DModel
from cogvx_fast.vae import FastAutoencoderKLCogVideoX
from tests import toy
from tests.availability import set_missing


@pytest.fixture
def count(monkeypatch):
    """How often each kind of projection is called in a generation of 4 steps. They carry no hooks: a hook is called."""

    def generate(config):
        fast, counts = accelerate(toy.pipeline("1.5-5b"), config), {}
        transformer, forward = fast.transformer, torch.nn.Linear.forward
        names = {transformer.norm_out.linear: "norm_out", transformer.patch_embed.text_proj: "text_proj"}
        names |= {
            norm.linear: "norm" for block in transformer.transformer_blocks for norm in (block.norm1, block.norm2)
        }

        def counting(linear, x):
            if linear in names:
                counts[names[linear]] = counts.get(names[linear], 0) + 1
            return forward(linear, x)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Linear, "forward", counting)
            fast(**toy.inputs(num_steps=4, output_type="latent"))
        return counts

    return generate


def test_a_generation_computes_its_constants_once(count):
    assert count(EngineConfig()) == {"norm": 6, "norm_out": 1, "text_proj": 1}


def test_each_switch_shows_its_effect(count):
    assert count(EngineConfig(modulation_table=False)) == {"norm": 6 * 4, "norm_out": 4, "text_proj": 1}
    assert count(EngineConfig(reuse_text_projection=False)) == {"norm": 6, "norm_out": 1, "text_proj": 4}


def test_our_models_take_the_place_of_diffusers_own():
    reference = toy.pipeline()
    fast = accelerate(reference)
    assert isinstance(fast.transformer, FastCogVideoXTransformer3DModel)
    assert type(reference.transformer) is diffusers.CogVideoXTransformer3DModel
    again = accelerate(fast)
    assert again.transformer is fast.transformer


class Own(diffusers.CogVideoXTransformer3DModel):
    """Somebody's, with a forward pass that ours would lose."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        return tuple(2 * part for part in output)


def test_a_transformer_with_a_forward_of_its_own_is_left_and_named():
    reference = toy.pipeline()
    reference.transformer.__class__ = Own
    expected = reference(**toy.inputs(output_type="latent")).frames
    fast = accelerate(reference)
    assert fast.transformer is reference.transformer
    assert torch.equal(fast(**toy.inputs(output_type="latent")).frames, expected)
    line = fast.engine_report().line("adopt blocks")
    assert not line.applied and "Own has a forward of its own, which runs as it is" in line.detail


def test_lora_loaded_by_the_pipeline_before_or_after(tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    donor = toy.pipeline()
    torch.manual_seed(0)
    donor.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    donor.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(donor.transformer))

    reference, before, after = (toy.pipeline() for _ in range(3))
    plain = reference(**toy.inputs(output_type="latent")).frames
    reference.load_lora_weights(tmp_path)
    before.load_lora_weights(tmp_path, adapter_name="style")
    before, after = accelerate(before), accelerate(after)
    after.load_lora_weights(tmp_path)
    expected = reference(**toy.inputs(output_type="latent")).frames
    assert not torch.allclose(expected, plain, rtol=1e-2)
    for fast in (before, after):
        output = fast(**toy.inputs(output_type="latent")).frames
        assert ((output - expected).norm() / expected.norm()).item() < 1e-4
    assert "style" in str(before.engine_report())


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["transformer", "blocks"])
def test_torch_compile_by_hand_gives_the_same(compiled):
    # `eager` traces as every backend does, without the minutes that generating code would take.
    fast = accelerate(toy.pipeline())
    expected = fast(**toy.inputs(output_type="latent")).frames
    if compiled == "transformer":
        fast.transformer = torch.compile(fast.transformer, backend="eager")
    else:
        fast.transformer.compile_repeated_blocks(backend="eager")
    output = fast(**toy.inputs(output_type="latent")).frames
    assert ((output - expected).norm() / expected.norm()).item() < 1e-5


def test_the_fast_vae_is_an_option_that_can_be_taken_back():
    reference = toy.pipeline()
    fast = accelerate(reference, EngineConfig(fast_vae=True))
    assert isinstance(fast.vae, FastAutoencoderKLCogVideoX)
    plain = accelerate(fast, EngineConfig(fast_vae=False))
    assert type(plain.vae) is type(reference.vae) and plain.vae.decoder is reference.vae.decoder
    assert "off  vae" in str(plain.engine_report())
    latents = torch.randn(1, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference.decode_latents(latents)
        assert torch.equal(plain.decode_latents(latents), expected)
        assert not torch.equal(fast.decode_latents(latents), expected)  # another order of rounding: ours did run


def test_a_vae_that_cannot_be_adopted_is_left_and_named():
    reference = toy.pipeline()
    reference.vae.register_to_config(act_fn="gelu")
    fast = accelerate(reference, EngineConfig(fast_vae=True))
    line = fast.engine_report().line("vae")
    assert fast.vae is reference.vae
    assert not line.applied and "its activation is 'gelu'" in line.detail


def test_a_vae_put_in_later_is_made_fast_too():
    fast = accelerate(toy.pipeline(), EngineConfig(fast_vae=True))
    fast.vae = toy.vae(seed=5)
    fast(**toy.inputs(num_steps=1))
    assert isinstance(fast.vae, FastAutoencoderKLCogVideoX)


def test_by_default_the_fast_vae_runs_where_it_keeps_the_contract(monkeypatch):
    if convolution.why_unavailable() is None:
        assert isinstance(accelerate(toy.pipeline()).vae, FastAutoencoderKLCogVideoX)
    set_missing(monkeypatch, {"direct": "no C++ compiler found"})
    fast = accelerate(toy.pipeline())  # fp32 on a CPU
    assert type(fast.vae) is diffusers.AutoencoderKLCogVideoX
    line = fast.engine_report().line("vae")
    assert not line.applied and "(no C++ compiler found)" in line.detail
    assert "round 2 to 3 times as much" in line.detail
    fast.to(torch.bfloat16)
    fast(**toy.inputs(num_steps=1))
    assert isinstance(fast.vae, FastAutoencoderKLCogVideoX) and fast.engine_report().line("vae").applied
    fast.to(torch.float32)
    fast(**toy.inputs(num_steps=1))
    assert type(fast.vae) is diffusers.AutoencoderKLCogVideoX
