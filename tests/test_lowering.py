"""The passes, their order, and that the engine's constants are computed once in a real generation."""

import diffusers
import pytest
import torch
from cogvx_kernels.cpu import convolution

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.lowering import PASSES
from cogvx_fast.transformer import FastCogVideoXTransformer3DModel
from cogvx_fast.vae import FastAutoencoderKLCogVideoX
from tests import toy


def count_calls(module, counts, name):
    def hook(*_):
        counts[name] = counts.get(name, 0) + 1

    return module.register_forward_hook(hook)


def generate_and_count(config):
    """How often the projections ran in a generation of 4 steps."""
    fast = accelerate(toy.pipeline("1.5-5b"), config)
    counts: dict[str, int] = {}
    transformer = fast.transformer
    for block in transformer.transformer_blocks:
        count_calls(block.norm1.linear, counts, "norm")
        count_calls(block.norm2.linear, counts, "norm")
    count_calls(transformer.norm_out.linear, counts, "norm_out")
    count_calls(transformer.patch_embed.text_proj, counts, "text_proj")
    fast(**toy.inputs(num_steps=4, output_type="latent"))
    return counts


def test_a_generation_computes_its_constants_once():
    assert generate_and_count(EngineConfig()) == {"norm": 6, "norm_out": 1, "text_proj": 1}


def test_each_switch_shows_its_effect():
    without = EngineConfig(modulation_table=False, reuse_text_projection=False)
    assert generate_and_count(without) == {"norm": 6 * 4, "norm_out": 4, "text_proj": 4}


def test_passes_run_in_order_and_report_in_order():
    assert [run.__name__ for run in PASSES] == [
        "note_adapters",
        "adopt_blocks",
        "check_attention",
        "plan_modulation_table",
        "plan_text_projection",
        "plan_projections",
        "quantize",
        "check_compile",
        "check_precision",
        "adopt_vae",
    ]
    fast = accelerate(toy.pipeline())
    assert isinstance(fast.transformer, FastCogVideoXTransformer3DModel)
    assert [line.name for line in fast.engine_report().lines] == [
        "lora",
        "adopt blocks",
        "attention",
        "modulation table",
        "text projection",
        "projections",
        "quantize",
        "compile",
        "precision",
        "vae",
    ]


def test_the_report_states_the_bytes_of_the_table():
    fast = accelerate(toy.pipeline())
    norms = [norm for block in fast.transformer.transformer_blocks for norm in (block.norm1, block.norm2)]
    expected = sum(p.numel() * 4 for norm in norms for p in norm.linear.parameters())
    line = fast.engine_report().lines[3]
    assert f"{expected / 1e6:.1f} MB of AdaLN weights" in line.detail


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


def report_line(pipe, name):
    return next(line for line in pipe.engine_report().lines if line.name == name)


@pytest.mark.parametrize(("units", "applied"), [("AMX-BF16", False), (None, True)])
def test_the_report_says_when_a_cpu_is_better_at_bf16(units, applied, monkeypatch):
    from cogvx_fast import machine

    monkeypatch.setattr(machine, "cpu_bf16_units", lambda: units)
    line = report_line(accelerate(toy.pipeline()), "precision")
    assert line.applied is applied and line.detail.startswith("float32")
    assert units is None or units in line.detail
    line = report_line(accelerate(toy.pipeline().to(torch.bfloat16)), "precision")
    assert line.applied is not applied and line.detail.startswith("bfloat16")


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
    line = fast.engine_report().lines[-1]
    assert fast.vae is reference.vae
    assert not line.applied and "its activation is 'gelu'" in line.detail


def test_the_report_says_where_tiling_leaves_diffusers_code_running():
    reference = toy.pipeline()
    assert "tiling" not in accelerate(reference, EngineConfig(fast_vae=True)).engine_report().lines[-1].detail
    reference.vae.enable_tiling()
    assert (
        "tiling on: diffusers' own code"
        in accelerate(reference, EngineConfig(fast_vae=True)).engine_report().lines[-1].detail
    )


def test_a_vae_put_in_later_is_made_fast_too():
    fast = accelerate(toy.pipeline(), EngineConfig(fast_vae=True))
    fast.vae = toy.vae(seed=5)
    fast(**toy.inputs(num_steps=1))
    assert isinstance(fast.vae, FastAutoencoderKLCogVideoX)


def test_by_default_the_fast_vae_runs_where_it_keeps_the_contract(monkeypatch):
    if convolution.why_not() is None:
        assert isinstance(accelerate(toy.pipeline()).vae, FastAutoencoderKLCogVideoX)
    monkeypatch.setattr(convolution, "why_not", lambda: "no C++ compiler found")
    fast = accelerate(toy.pipeline())  # fp32 on a CPU
    assert type(fast.vae) is diffusers.AutoencoderKLCogVideoX
    line = report_line(fast, "vae")
    assert not line.applied and "round 2 to 3 times as much" in line.detail
    fast.to(torch.bfloat16)
    fast(**toy.inputs(num_steps=1))
    assert isinstance(fast.vae, FastAutoencoderKLCogVideoX) and report_line(fast, "vae").applied
    fast.to(torch.float32)
    fast(**toy.inputs(num_steps=1))
    assert type(fast.vae) is diffusers.AutoencoderKLCogVideoX
