"""The report: a function of the plan before a generation, and of what ran after it."""

import dataclasses

import diffusers
import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from peft import LoraConfig

from cogvx_fast import EngineConfig, accelerate, machine
from cogvx_fast.plan import UNLIMITED, Product
from cogvx_fast.report import describe
from cogvx_fast.session import Ran
from cogvx_fast.transformer.binding import BlockRan
from tests import toy
from tests.generation import plan

LINES = [
    *("lora", "adopt blocks", "attention", "modulation table", "text projection", "projections"),
    *("quantize", "compile", "precision", "vae"),
]


def run(pipe, **inputs):
    pipe(**toy.inputs(**{"num_steps": 2, "output_type": "latent", **inputs}))
    return pipe.engine_report()


@pytest.fixture(scope="module")
def pipe():
    return accelerate(toy.pipeline())


def test_it_has_a_line_for_each_part(pipe):
    report = accelerate(toy.pipeline()).engine_report()
    assert [line.name for line in report.lines] == LINES == [line.name for line in run(pipe).lines]
    assert report.line("vae") is report.lines[-1]
    text = str(report).splitlines()
    assert text[0] == "engine: exact (changes the order of rounding)"
    assert text[1] == "  off  lora              no adapters loaded at this point"


def test_it_is_a_function_of_the_plan_and_of_what_ran(pipe):
    given = plan(pipe.transformer)
    first, second = (describe(pipe, EngineConfig(), given, "", None) for _ in range(2))
    assert first == second
    exact = dataclasses.replace(given, keeps_modulation=False, keeps_text=False, product=Product.CUBLASLT)
    report = describe(pipe, EngineConfig(), exact, "", None)
    assert not report.line("modulation table").applied and not report.line("text projection").applied
    assert report.line("projections").detail.startswith("cublaslt, at a generation's first step")
    limited = dataclasses.replace(given, memory_limit=2**30, memory="half of it")
    assert [line.name for line in describe(pipe, EngineConfig(), limited, "", None).lines] == ["memory", *LINES]
    assert (
        limited.memory_limit != UNLIMITED
        and describe(pipe, EngineConfig(), limited, "", None).line("memory").detail == "half of it"
    )
    assert describe(pipe, EngineConfig(), given, "all of it", None).line("quantize").detail == "all of it"


def test_before_a_generation_it_says_what_will_be_and_then_what_was():
    fast = accelerate(toy.pipeline())
    before = fast.engine_report()
    assert before == fast.engine_report()
    assert "at a generation's first step" in before.line("projections").detail
    assert before.line("attention").detail.startswith("sdpa: the flash kernel (not flash-attn-3: ")
    after = run(fast)
    assert "Q, K and V in one product in 3 of 3 blocks" in after.line("projections").detail
    assert after.line("attention") == before.line("attention")


def test_decoding_is_of_the_models_own_size_and_then_of_what_was_decoded():
    fast = accelerate(toy.pipeline(), EngineConfig(fast_vae=True))
    assert "planned for latents of 1x3x4x4" in fast.engine_report().line("vae").detail
    assert "planned for latents of 1x3x6x4" in run(fast, height=48, output_type="pt").line("vae").detail
    with torch.no_grad():
        fast.decode_latents(torch.randn(1, 2, 16, 4, 6))
    report = fast.engine_report()
    assert "planned for latents of 1x2x4x6" in report.line("vae").detail
    assert "in one product in 3 of 3" in report.line("projections").detail  # what was denoised last is not forgotten


def test_before_a_generation_it_is_for_where_the_models_are_now():
    fast = accelerate(toy.pipeline())
    assert fast.engine_report().line("precision").detail.startswith("float32")
    fast.to(torch.bfloat16)
    assert fast.engine_report().line("precision").detail.startswith("bfloat16")


def test_where_the_engine_cannot_work_yet_it_says_so():
    """A pipeline for a GPU is asked before it is there; in a generation the same is refused."""
    pipe = accelerate(toy.pipeline(), EngineConfig(attention="triton"))
    (line,) = pipe.engine_report().lines
    assert not line.applied and "attention='triton' cannot work here: it runs on cuda" in line.detail
    assert "not where the models are now" in str(pipe.engine_report())
    with pytest.raises(ValueError, match="it runs on cuda"):
        pipe(**toy.inputs(num_steps=1))


def test_it_states_the_bytes_of_the_table(pipe):
    norms = [norm for block in pipe.transformer.transformer_blocks for norm in (block.norm1, block.norm2)]
    expected = sum(p.numel() * 4 for norm in norms for p in norm.linear.parameters())
    detail = pipe.engine_report().line("modulation table").detail
    assert f"{expected / 1e6:.1f} MB of AdaLN weights" in detail and "table: 0.01 MB a step" in detail


def test_it_names_adapters_and_what_they_keep_from_being_merged():
    fast = accelerate(toy.pipeline())
    report = run(fast)
    assert report.line("projections").applied and not report.line("lora").applied
    fast.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    report = run(fast)
    assert report.line("lora").applied and report.line("lora").detail == "style"
    assert "in one product in 0 of 3 blocks; the others have adapters" in report.line("projections").detail


def test_it_says_what_was_called_for_what_hangs_on_it():
    fast = accelerate(toy.pipeline())
    assert run(fast).line("adopt blocks").detail == "3 blocks on one joint text-and-video stream"
    fast.transformer.transformer_blocks[1].register_forward_hook(lambda *_: None)
    assert "; 1 of them are called as diffusers calls them" in run(fast).line("adopt blocks").detail


def test_it_says_what_was_computed_in_each_step_after_all():
    fast = accelerate(toy.pipeline())
    fast.transformer.time_embedding.register_forward_hook(lambda *_: None)
    fast.transformer.patch_embed.register_forward_hook(lambda *_: None)
    report = run(fast)
    for name in ("modulation table", "text projection"):
        assert not report.line(name).applied and "computed anew in each step" in report.line(name).detail


def test_it_says_what_was_computed_again():
    def change(pipe, step, timestep, tensors):
        tensors["prompt_embeds"].mul_(1.5)
        return {}

    fast = accelerate(toy.pipeline())
    report = run(fast, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert "computed 2 times, as what it is made from was changed" in report.line("text projection").detail
    assert "times" not in report.line("modulation table").detail


def test_it_says_where_diffusers_forward_ran_and_why():
    fast = accelerate(toy.pipeline())
    with torch.autocast("cpu", torch.bfloat16):
        report = run(fast)
    for name in ("adopt blocks", "attention", "compile"):
        assert not report.line(name).applied and "torch.autocast('cpu') is on" in report.line(name).detail
    assert run(fast).line("adopt blocks").applied


def test_it_says_when_our_forward_pass_was_never_entered():
    fast = accelerate(toy.pipeline())
    forward = diffusers.CogVideoXTransformer3DModel.forward
    fast.transformer.forward = lambda *args, **kwargs: forward(fast.transformer, *args, **kwargs)
    line = run(fast).line("adopt blocks")
    assert not line.applied and "never entered in the last generation" in line.detail


def test_it_names_the_backend_that_was_set_by_hand():
    fast = accelerate(toy.pipeline())
    for block in fast.transformer.transformer_blocks:
        block.attn1.processor._attention_backend = diffusers.models.attention_dispatch.AttentionBackendName.NATIVE
    assert fast.engine_report().line("attention").detail == "set by hand: native"


def test_it_counts_the_steps_that_were_redone_and_the_bytes_of_copies(pipe):
    blocks = (BlockRan(False, True, "triton", "int8", 1500000), BlockRan(True, False, "torch", "", 0))
    ran = Ran(steps=4, fast=4, blocks=blocks, redone=2)
    report = describe(pipe, EngineConfig(), plan(pipe.transformer), "", ran)
    assert "2 of 4 steps redone exact" in report.line("attention").detail
    assert "weights packed for oneDNN, 1.5 MB more" in report.line("projections").detail
    assert "int8 products of our own in 1" in report.line("projections").detail
    assert "norms, gates and rotations in Triton in 1" in report.line("projections").detail
    gpu = dataclasses.replace(plan(pipe.transformer), device=torch.device("cuda"))
    fp8 = Ran(steps=1, fast=1, blocks=(BlockRan(False, True, "triton", "float8_e4m3fn", 0),) * 2)
    detail = describe(pipe, EngineConfig(), gpu, "", fp8).line("projections").detail
    assert "float8_e4m3fn products of our own, fed by 8-bit norms, in 2" in detail


def test_it_says_why_norms_are_not_our_cpp(pipe):
    ran = Ran(steps=1, fast=1, blocks=(BlockRan(False, True, "torch", "plain", 0),))
    missing = dataclasses.replace(plan(pipe.transformer), why_not_cpp="g++ did not finish in 120 s")
    line = describe(pipe, EngineConfig(), missing, "", ran).line("projections")
    assert "norms, gates and rotations as torch's own operations: g++ did not finish in 120 s" in line.detail


def test_compile_is_chosen_by_the_device_and_stated(pipe):
    line = pipe.engine_report().line("compile")
    assert not line.applied and "off on cpu" in line.detail
    line = accelerate(toy.pipeline(), EngineConfig(compile="blocks")).engine_report().line("compile")
    assert line.applied and line.detail == "blocks"


@pytest.mark.parametrize(("units", "applied"), [("AMX-BF16", False), (None, True)])
def test_it_says_when_a_cpu_is_better_at_bf16(units, applied, monkeypatch):
    monkeypatch.setattr(machine, "cpu_bf16_units", lambda: units)
    line = accelerate(toy.pipeline()).engine_report().line("precision")
    assert line.applied is applied and line.detail.startswith("float32")
    assert units is None or units in line.detail
    line = accelerate(toy.pipeline().to(torch.bfloat16)).engine_report().line("precision")
    assert line.applied is not applied and line.detail.startswith("bfloat16")


def test_it_says_where_tiling_leaves_diffusers_code_running():
    reference = toy.pipeline()

    def detail():
        return accelerate(reference, EngineConfig(fast_vae=True)).engine_report().line("vae").detail

    assert "tiling" not in detail()
    reference.vae.enable_tiling()
    assert "tiling on: diffusers' own code" in detail()


def test_a_cache_shows_in_what_was_called():
    fast = accelerate(toy.pipeline())
    fast.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: fast.current_timestep,
        )
    )
    # It hooks attention, which is called; the blocks are not.
    assert "called as diffusers" not in run(fast).line("adopt blocks").detail
    assert "in one product in 3 of 3" in fast.engine_report().line("projections").detail
