"""What is not finite is never a video: latents before they are decoded, and the frames that are made of good ones."""

import pytest
import torch

from cogvx_fast import EngineConfig, FastCogVideoXPipeline
from cogvx_fast.vae.checks import check_frames
from tests import toy

DAMAGED = "the decoded frames must be finite, got .* NaN .*; the likely cause is a damaged autoencoder"


def pipeline(engine="exact"):
    pipe = FastCogVideoXPipeline(**toy.pipeline().components, engine=engine)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def damage(pipe):
    """One weight near the end, as of a file with a flipped bit: latents are good, some pixels are not."""
    with torch.no_grad():
        pipe.vae.decoder.conv_out.conv.bias[1] = torch.inf
    return pipe


def latents():
    return torch.randn(1, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("engine", ["exact", EngineConfig(fast_vae=False)], ids=["ours", "diffusers'"])
def test_frames_of_a_decoder_that_overflows(engine):
    pipe = damage(pipeline(engine))
    with pytest.raises(ValueError, match=DAMAGED.replace("NaN", "infinite")):
        pipe(**toy.inputs(num_steps=1))
    with pytest.raises(ValueError, match="the decoded frames must be finite"):
        pipe.decode_latents(latents())
    with pytest.raises(ValueError, match="the decoded frames must be finite"):
        list(pipe.decode_stream(latents()))
    assert torch.isfinite(pipe(**toy.inputs(num_steps=1, output_type="latent")).frames).all()


def test_a_piece_that_is_good_comes_before_the_one_that_is_not(monkeypatch):
    pipe = pipeline()
    vae, pieces = pipe.vae, [torch.zeros(1, 3, 9, 8, 8), torch.full((1, 3, 8, 8, 8), torch.nan)]
    monkeypatch.setattr(type(vae), "decode_stream", lambda self, z: iter(pieces))
    stream = pipe.decode_stream(latents())
    assert next(stream) is pieces[0]
    with pytest.raises(ValueError, match=DAMAGED):
        next(stream)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_anywhere_is_found(dtype, value):
    frames = torch.randn(1, 3, 3, 5, 7).to(dtype)
    check_frames(frames)
    check_frames(frames[:, :, :0])
    frames[0, 2, 1, 4, 3] = value
    cause = "overflow: float16 ends at 65504; decode in bfloat16" if dtype is torch.float16 else "a damaged autoencoder"
    with pytest.raises(ValueError, match=f"1 {'NaN' if value != value else 'infinite'} .*likely cause is {cause}"):
        check_frames(frames)
