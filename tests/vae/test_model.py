"""The fast autoencoder is diffusers' autoencoder: the same calls, the same numbers, the same files."""

import copy
import json

import pytest
import torch
from cogvx_kernels import ops
from cogvx_kernels.conv3d import winograd
from diffusers import AutoencoderKLCogVideoX

from cogvx_fast.plan import VaePlan
from cogvx_fast.vae import FastAutoencoderKLCogVideoX, chunks, model
from tests import toy

from .conftest import distance, family, randn, run_with

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def _without_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize(
    ("batch", "time", "height", "width"),
    [(1, t, 2, 3) for t in range(1, 14)] + [(2, 2, 5, 7), (2, 5, 3, 4), (1, 3, 1, 1), (2, 1, 4, 4)],
)
def test_decodes_what_diffusers_decodes(pair, decoded, monkeypatch, batch, time, height, width, impl):
    run_with(impl, monkeypatch)
    latents = randn(batch, 16, time, height, width, seed=time)
    assert distance(pair[1].decode(latents).sample, decoded(latents)) < 1e-5


@pytest.fixture(scope="module")
def decoded(pair):
    """What diffusers decodes, each once for all implementations of ours."""
    known = {}

    def decode(latents):
        key = (tuple(latents.shape), latents.sum().item())
        if key not in known:
            known[key] = pair[0].decode(latents).sample
        return known[key]

    return decode


def test_a_plain_tuple_on_request(pair):
    latents = randn(1, 16, 3, 2, 2)
    (frames,) = pair[1].decode(latents, return_dict=False)
    assert torch.equal(frames, pair[1].decode(latents).sample)


@pytest.mark.parametrize(
    ("batch", "frames", "height", "width"),
    [(1, f, 16, 24) for f in (1, 2, 3, 5, 7, 8, 9, 12, 17, 20)] + [(2, 9, 27, 13), (2, 1, 8, 8)],
)
def test_encodes_what_diffusers_encodes(pair, batch, frames, height, width):
    reference, fast = pair
    pixels = randn(batch, 3, frames, height, width, seed=frames)
    expected, output = (vae.encode(pixels).latent_dist for vae in (reference, fast))
    assert distance(output.parameters, expected.parameters) < 1e-5
    assert distance(output.mode(), expected.mode()) < 1e-5
    samples = [posterior.sample(torch.Generator().manual_seed(7)) for posterior in (expected, output)]
    assert distance(samples[1], samples[0]) < 1e-5
    assert distance(samples[1], output.mode()) > 1e-2


def test_the_toy_of_the_pipelines_and_the_whole_model():
    reference = toy.vae()
    fast = FastAutoencoderKLCogVideoX.adopt(reference)
    pixels = randn(1, 3, 9, 16, 24)
    for arguments in ({}, {"sample_posterior": True}):
        outputs = [vae(pixels, **arguments, generator=torch.Generator().manual_seed(1)) for vae in (reference, fast)]
        assert distance(outputs[1].sample, outputs[0].sample) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_half_precision_is_no_further_from_fp32_than_diffusers(pair, monkeypatch, impl):
    run_with(impl, monkeypatch)
    monkeypatch.setattr(ops, "winograd_pays", lambda kernel, *_: winograd.takes(kernel))
    truth, half = pair[0], copy.deepcopy(pair[0]).to(torch.bfloat16)
    fast = FastAutoencoderKLCogVideoX.adopt(half)
    errors = {"decode": [], "encode": []}
    for seed in range(4):
        latents, pixels = randn(1, 16, 5, 4, 6, seed=seed).bfloat16(), randn(1, 3, 9, 32, 48, seed=seed).bfloat16()
        expected = truth.decode(latents.float()).sample, truth.encode(pixels.float()).latent_dist.parameters
        for vae in (half, fast):
            decoded, encoded = vae.decode(latents).sample, vae.encode(pixels).latent_dist.parameters
            assert decoded.dtype == encoded.dtype == torch.bfloat16
            errors["decode"].append(distance(decoded, expected[0]))
            errors["encode"].append(distance(encoded, expected[1]))
    for kind, values in errors.items():
        assert sum(values[1::2]) <= 1.1 * sum(values[::2]), (kind, values)


@pytest.mark.slow
def test_fp32_is_no_further_from_fp64_than_diffusers(pair, monkeypatch):
    run_with("cpu", monkeypatch)
    truth, (reference, fast) = copy.deepcopy(pair[0]).double(), pair
    errors = {"decode": [], "encode": []}
    for seed in range(4):
        latents, pixels = randn(1, 16, 5, 4, 6, seed=seed), randn(1, 3, 9, 32, 48, seed=seed)
        expected = truth.decode(latents.double()).sample, truth.encode(pixels.double()).latent_dist.parameters
        for vae in (reference, fast):
            errors["decode"].append(distance(vae.decode(latents).sample, expected[0]))
            errors["encode"].append(distance(vae.encode(pixels).latent_dist.parameters, expected[1]))
    for kind, values in errors.items():
        assert sum(values[1::2]) <= 1.1 * sum(values[::2]), (kind, values)


@pytest.mark.parametrize("upcast", [True, False])
def test_force_upcast_means_what_it_means_in_diffusers(upcast):
    reference = family(force_upcast=upcast).to(torch.bfloat16)
    fast = FastAutoencoderKLCogVideoX.adopt(reference)
    latents = randn(1, 16, 2, 3, 3).bfloat16()
    for vae in (reference, fast):
        assert vae.decode(latents).sample.dtype == torch.bfloat16


def test_other_chunks_are_other_numbers_and_follow_the_setting(fresh):
    # Guards the comparisons above: GroupNorm's statistics are those of a chunk.
    reference, fast = fresh
    latents = randn(1, 16, 6, 3, 4)
    by_two = fast.decode(latents).sample
    for vae in fresh:
        vae.num_latent_frames_batch_size = 4
    expected = reference.decode(latents).sample
    assert distance(fast.decode(latents).sample, expected) < 1e-5
    assert distance(by_two, expected) > 1e-3


def test_the_same_weights_configuration_and_files(fresh, tmp_path):
    reference, fast = fresh
    ours, theirs = fast.state_dict(), reference.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
    assert fast.config == reference.config
    fast.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "AutoencoderKLCogVideoX"
    loaded = AutoencoderKLCogVideoX.from_pretrained(tmp_path)
    latents = randn(1, 16, 3, 3, 4)
    expected = reference.decode(latents).sample
    assert torch.equal(loaded.decode(latents).sample, expected)
    back = fast.as_reference()
    assert type(back) is AutoencoderKLCogVideoX and torch.equal(back.decode(latents).sample, expected)


def test_weights_changed_later_are_seen(fresh):
    reference, fast = fresh
    latents = randn(1, 16, 3, 3, 4)
    fast.decode(latents)
    for parameter in reference.parameters():
        parameter.mul_(1.1)
    assert distance(fast.decode(latents).sample, reference.decode(latents).sample) < 1e-5


def test_quant_convolutions_are_run():
    reference = family(use_quant_conv=True, use_post_quant_conv=True, latent_channels=3)
    fast = FastAutoencoderKLCogVideoX.adopt(reference)
    latents, pixels = randn(1, 3, 4, 3, 3), randn(1, 3, 5, 16, 16)
    assert distance(fast.decode(latents).sample, reference.decode(latents).sample) < 1e-5
    expected = reference.encode(pixels).latent_dist.parameters
    assert distance(fast.encode(pixels).latent_dist.parameters, expected) < 1e-5


@pytest.mark.slow
def test_tiling_and_slicing_keep_diffusers_numbers_bit_for_bit(fresh):
    reference, fast = fresh
    latents, pixels = randn(2, 16, 3, 8, 9), randn(2, 3, 5, 64, 72)
    whole = fast.decode(latents).sample
    for vae in fresh:
        vae.enable_tiling(tile_sample_min_height=48, tile_sample_min_width=40)
    tiled = fast.decode(latents).sample
    assert torch.equal(tiled, reference.decode(latents).sample)
    assert torch.equal(fast.encode(pixels).latent_dist.parameters, reference.encode(pixels).latent_dist.parameters)
    assert distance(tiled, whole) > 1e-3
    assert torch.equal(torch.cat(list(fast.decode_stream(latents)), dim=2), tiled)
    for vae in fresh:
        vae.disable_tiling()
        vae.enable_slicing()
    assert torch.equal(fast.decode(latents).sample, reference.decode(latents).sample)
    assert torch.equal(fast.encode(pixels).latent_dist.parameters, reference.encode(pixels).latent_dist.parameters)


@pytest.mark.parametrize("time", [1, 2, 3, 7, 8])
def test_a_stream_is_the_same_video(pair, time):
    fast = pair[1]
    latents = randn(2, 16, time, 3, 4)
    chunks = list(fast.decode_stream(latents))
    assert len(chunks) == max(time // 2, 1)
    assert torch.equal(torch.cat(chunks, dim=2), fast.decode(latents).sample)


def test_a_stream_does_no_work_before_it_is_asked(pair, monkeypatch):
    done = []
    decode_chunk = model.decode_chunk
    monkeypatch.setattr(model, "decode_chunk", lambda *a: done.append(1) or decode_chunk(*a))
    stream = pair[1].decode_stream(randn(1, 16, 6, 2, 2))
    assert not done
    next(stream)
    assert len(done) == 1
    with torch.enable_grad():
        next(stream)
        assert torch.is_grad_enabled()


def test_gradients_come_from_diffusers_code(fresh):
    with torch.enable_grad():
        gradients = []
        for vae in fresh:
            latents = randn(1, 16, 3, 2, 2).requires_grad_()
            vae.decode(latents).sample.square().sum().backward()
            gradients.append(latents.grad)
    assert torch.equal(*gradients)


def test_hooks_on_modules_are_called(fresh):
    reference, fast = fresh
    called = []
    fast.decoder.up_blocks[0].register_forward_hook(lambda *_: called.append(1))
    latents = randn(1, 16, 2, 2, 2)
    assert torch.equal(fast.decode(latents).sample, reference.decode(latents).sample)
    assert called


def test_a_hook_on_the_whole_model_moves_it(fresh):
    # What enable_model_cpu_offload() hangs on it.
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    reference, fast = fresh
    hook = Counting()
    add_hook_to_module(fast, hook)
    latents = randn(1, 16, 2, 2, 2)
    assert distance(fast.decode(latents).sample, reference.decode(latents).sample) < 1e-5
    assert hook.calls == 1
    with pytest.raises(ValueError, match="make the pipeline fast first"):
        FastAutoencoderKLCogVideoX.adopt(fast)


def test_no_frame_is_read_from_a_past_that_is_over(pair):
    """Two videos one after the other: the caches of the first are not the second's."""
    fast = pair[1]
    first, second = randn(1, 16, 5, 2, 3, seed=1), randn(1, 16, 5, 2, 3, seed=2)
    expected = fast.decode(second).sample
    fast.decode(first)
    assert torch.equal(fast.decode(second).sample, expected)


def test_the_last_chunk_leaves_nothing_behind(pair):
    state = chunks.ChunkState(VaePlan(torch.device("cpu"), torch.float32), is_last=True)
    model.decode_chunk(pair[1].decoder, randn(1, 16, 2, 2, 2), state)
    assert not state.conv_cache
