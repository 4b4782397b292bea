"""A pipeline in a memory limit: what becomes of it when it is made, for each generation, and on a GPU."""

import pytest
import torch

from cogvx_fast import EngineConfig, FastCogVideoXPipeline, accelerate, loading
from cogvx_fast.memory import LimitError
from cogvx_fast.memory.options import offload_of
from cogvx_fast.memory.weights import Models
from cogvx_fast.plan import Offload
from cogvx_fast.quantization import pipeline as quantization
from cogvx_fast.quantization.apply import quantized_names
from cogvx_fast.quantization.recipes import Target
from tests import toy

pytestmark = pytest.mark.slow

GPU = Target("cuda", "a GPU of 8.0", (8, 0))
CPU = Target("cpu", "a CPU", int8_units="units")


def memory_line(pipe):
    return pipe.engine_report().line("memory")


def limited(limit, **fields):
    return accelerate(toy.pipeline("5b"), EngineConfig(memory_limit=limit, **fields))


def least(tier=None):
    """Bytes below which the model's own size does not fit."""
    with pytest.raises(LimitError) as error:
        limited(1, tier=tier)
    return error.value.smallest[1].peak


def test_what_fits_exact_is_exact():
    pipe = limited("1GiB")
    assert pipe.engine_report().tier == "exact"
    assert memory_line(pipe).detail.startswith("1.00 GiB for the model's own size: transformer as it is")
    expected = accelerate(toy.pipeline("5b"))(**toy.inputs()).frames
    assert torch.equal(pipe(**toy.inputs()).frames, expected)
    assert "for 9 frames of 32x32" in memory_line(pipe).detail


def test_precision_goes_when_nothing_else_helps():
    assert least() < least("exact")
    kept = limited(least("exact"))
    assert not [*quantized_names(kept.transformer), *quantized_names(kept.text_encoder)]
    assert ", frames within " in memory_line(kept).detail  # they gave way first
    text_alone = limited(least("exact") - 1)
    assert text_alone.transformer.recipe is None and list(quantized_names(text_alone.text_encoder))
    quantized = limited(least())
    assert quantized.transformer.recipe in ("int8-weight", "int8")  # by what this CPU multiplies
    assert quantized.engine_report().tier == "balanced"
    assert quantized(**toy.inputs(num_steps=1)).frames.isfinite().all()


def test_what_does_not_fit_is_refused_with_what_would():
    with pytest.raises(LimitError, match=r"the smallest possible is .*with transformer int8"):
        limited(10_000)
    with pytest.raises(
        LimitError, match=r"the smallest possible is .*with transformer as it is, text encoder as it is"
    ):
        limited(10_000, tier="exact")
    pipe = limited(least("exact"), tier="exact")
    own = r"17 frames of 32x32 .*; what fits: that limit, or a pipeline of another precision: .* or 9 frames of this"
    with pytest.raises(LimitError, match=own):
        pipe(**toy.inputs(num_frames=17, num_steps=50))
    assert pipe(**toy.inputs(num_steps=1)).frames.isfinite().all()


def test_where_the_own_size_does_not_fit_it_is_made_for_the_frames_that_do():
    pipe = limited(least("exact") - 1, tier="exact")
    assert "1 frames of 32x32, as the model's own 9 do not fit: transformer as it is" in memory_line(pipe).detail
    with pytest.raises(LimitError, match="9 frames of 32x32 in float32"):
        pipe(**toy.inputs(num_steps=50))
    assert pipe(**toy.inputs(num_frames=1, num_steps=1)).frames.isfinite().all()


def test_refused_before_anything_is_loaded(tmp_path):
    toy.pipeline().save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.write_bytes(b"never read")
    with pytest.raises(LimitError, match=r"memory_limit=0\.01 MiB is too small for 9 frames of 32x32 in bfloat16"):
        FastCogVideoXPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16, engine=EngineConfig(memory_limit="10KiB"))


def test_what_is_quantized_stays_so():
    pipe = accelerate(toy.pipeline(), EngineConfig(recipe="int8"))
    again = accelerate(pipe, EngineConfig(memory_limit="1GiB"))
    assert again.transformer.recipe == "int8" and "transformer int8" in memory_line(again).detail
    with pytest.raises(ValueError, match="is quantized already, by recipe 'int8'"):
        accelerate(pipe, EngineConfig(memory_limit="1GiB", recipe="fp8-weight"))


class OnGpu:
    """A pipeline that believes in a GPU: what it would offload is noted, and nothing moves."""

    def __init__(self, monkeypatch, limit):
        for module in (quantization, loading):
            monkeypatch.setattr(module, "targets", lambda: [GPU])
        monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: GPU if device.type == "cuda" else CPU))
        self.offloaded, self.moved = [], []
        self.pipe = accelerate(toy.pipeline("5b"), EngineConfig(memory_limit=limit))
        monkeypatch.setattr(self.pipe, "enable_model_cpu_offload", lambda device: self.offloaded.append(device))
        monkeypatch.setattr(
            "diffusers.DiffusionPipeline.to", lambda pipe, *args, **kwargs: self.moved.append(args) or pipe
        )


def test_a_gpu_gets_a_model_at_a_time_where_that_is_what_fits(monkeypatch):
    ample = OnGpu(monkeypatch, "1GiB")
    assert ample.pipe.to("cuda") is ample.pipe
    assert ample.moved == [("cuda",)] and not ample.offloaded
    # Less than all weights and more than the largest model with what it computes.
    weights = sum(p.numel() * 4 for m in (ample.pipe.transformer, ample.pipe.vae) for p in m.parameters())
    tight = OnGpu(monkeypatch, weights)
    assert tight.pipe.to("cuda", torch.float32) is tight.pipe
    assert tight.offloaded == [torch.device("cuda")] and tight.moved == [(torch.float32,)]
    assert "each model on the device only while it runs" in memory_line(tight.pipe).detail


def test_offloading_by_hand_counts():
    fast = accelerate(toy.pipeline("5b"), EngineConfig(memory_limit="1GiB"))
    assert offload_of(Models.of(fast)) is Offload.NONE
    fast.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    assert offload_of(Models.of(fast)) is Offload.BY_HAND
    fast(**toy.inputs(num_steps=1))
    assert "finer than whole models" in memory_line(fast).detail
