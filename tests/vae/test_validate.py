"""Bad latents and pixels are refused with what is wrong and what would be right."""

import pytest
import torch

from cogvx_fast import EngineConfig, accelerate
from cogvx_fast.vae import FastAutoencoderKLCogVideoX
from tests import toy

from .conftest import family, randn

GOOD = randn(1, 16, 2, 3, 4)


def with_value(value, dtype=torch.float32):
    latents = GOOD.clone().to(dtype)
    latents[0, 3, 1, 2, 0] = value
    return latents


@pytest.mark.parametrize(
    ("latents", "error", "message"),
    [
        (GOOD.numpy(), TypeError, "latents must be a tensor, got ndarray"),
        (GOOD[0], ValueError, r"latents must be \(batch, channels, time, height, width\), got 4 axes: \(16, 2, 3, 4\)"),
        (GOOD[:, :8], ValueError, r"latents must have 16 channels in axis 1, got 8"),
        (GOOD.transpose(1, 2), ValueError, r"got 2 in shape .*; they look like \(batch, time, channels"),
        (GOOD[:, :, :0], ValueError, "latents must have no empty axis"),
        (GOOD.half(), ValueError, r"latents must be torch.float32, as the autoencoder is, got torch.float16"),
        (GOOD.to("meta"), ValueError, "latents must be on cpu, where the autoencoder is, got meta"),
        (
            with_value(torch.nan),
            ValueError,
            "latents must be finite, got 1 NaN and 0 infinite of 384 values",
        ),
        (with_value(-torch.inf), ValueError, "got 0 NaN and 1 infinite .*in float16"),
    ],
)
@pytest.mark.parametrize("call", ["decode", "decode_stream"])
def test_bad_latents(pair, latents, error, message, call):
    with torch.no_grad(), pytest.raises(error, match=message):
        getattr(pair[1], call)(latents)


def test_overflow_of_half_precision_is_named():
    fast = FastAutoencoderKLCogVideoX.adopt(family().half())
    with pytest.raises(ValueError, match="overflow: float16 ends at 65504"):
        fast.decode(with_value(torch.inf, torch.float16))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (randn(1, 3, 8, 8), "pixels must be .* got 4 axes"),
        (randn(1, 4, 1, 8, 8), "pixels must have 3 channels"),
        (randn(1, 3, 1, 7, 16), "pixels must be at least 8 high and wide, got 7x16"),
        (randn(1, 3, 1, 8, 8) / 0, "pixels must be finite"),
    ],
)
def test_bad_pixels(pair, pixels, message):
    with pytest.raises(ValueError, match=message):
        pair[1].encode(pixels)


def test_pipelines_name_their_own_layout():
    fast = accelerate(toy.pipeline(), EngineConfig(fast_vae=True))
    for call in (fast.decode_latents, fast.decode_stream):
        with pytest.raises(ValueError, match=r"latents must be \(batch, time, channels, height, width\), got 4 axes"):
            call(randn(3, 16, 4, 4))
        with pytest.raises(ValueError, match="latents must be finite"):
            call(randn(1, 3, 16, 4, 4) / 0)
        with pytest.raises(TypeError, match=r"latents=\[1, 2\] must be a tensor, got list"):
            call([1, 2])
        with pytest.raises(
            ValueError, match=r"latents must have 16 channels in axis 2, got 3 .*permute\(0, 2, 1, 3, 4\)"
        ):
            call(randn(1, 16, 3, 4, 4))
        with pytest.raises(
            ValueError, match=r"latents must have 16 channels in axis 2, got 8 in shape \(1, 3, 8, 4, 4\)$"
        ):
            call(randn(1, 3, 8, 4, 4))
        with pytest.raises(ValueError, match=r"latents must have no empty axis, got shape \(1, 0, 16, 4, 4\)"):
            call(randn(1, 0, 16, 4, 4))
    fast.vae = None
    for call in (fast.decode_latents, fast.decode_stream):
        with pytest.raises(ValueError, match="no autoencoder to decode latents with"):
            call(randn(1, 3, 16, 4, 4))


@pytest.mark.parametrize("ours", [True, False])
def test_a_stream_makes_as_many_frames_as_asked_for_or_says_which_it_can(ours):
    fast = accelerate(toy.pipeline(), EngineConfig(fast_vae=ours))
    latents = randn(1, 5, 16, 4, 4)
    possible = [1, 8, 9, 16, 17]
    for number in possible:
        assert sum(chunk.shape[2] for chunk in fast.decode_stream(latents, number)) == number
    for number in {*range(-1, 20), 10**400, 10**5000} - set(possible):
        with pytest.raises(ValueError, match=r"num_frames=.* must be 8N \+ 1 or 8N, at most 17, .*; nearest: \d+"):
            fast.decode_stream(latents, number)
    for number, nearest in {0: "1", 5: "1 or 8", 10: "9 or 16", 18: "17"}.items():
        with pytest.raises(ValueError, match=rf"num_frames={number} .*; nearest: {nearest}$"):
            fast.decode_stream(latents, number)
    for number in (True, 9.0, "9", [9]):
        with pytest.raises(TypeError, match=r"num_frames=.* must be a whole number or None"):
            fast.decode_stream(latents, number)


def test_a_pipeline_streams_what_it_decodes():
    fast = accelerate(toy.pipeline(), EngineConfig(fast_vae=True))
    latents = randn(1, 5, 16, 4, 4)
    with torch.no_grad():
        expected = fast.decode_latents(latents)
    chunks = list(fast.decode_stream(latents))
    assert [chunk.shape[2] for chunk in chunks] == [9, 8]
    assert torch.equal(torch.cat(chunks, dim=2), expected)
    plain = accelerate(toy.pipeline(), engine=EngineConfig(fast_vae=False))
    with torch.no_grad():
        (whole,) = plain.decode_stream(latents)
    assert ((whole - expected).norm() / expected.norm()).item() < 1e-5


def test_a_stream_leaves_out_the_padding_of_1_5():
    fast = accelerate(toy.pipeline("1.5-5b"), EngineConfig(fast_vae=True))
    inputs = toy.inputs(output_type="pt")
    expected = fast(**inputs).frames
    inputs["generator"].manual_seed(0)
    latents = fast(**inputs | {"output_type": "latent"}).frames
    num_frames = expected.shape[1]
    assert latents.shape[1] * 4 - 3 > num_frames
    frames = torch.cat(list(fast.decode_stream(latents, num_frames)), dim=2)
    frames = fast.video_processor.postprocess_video(frames, output_type="pt")
    assert torch.equal(frames, expected)
    with pytest.raises(ValueError, match=r"num_frames=99 must be .*, at most 16, which is what these latents hold"):
        fast.decode_stream(latents, 99)
