"""The map from latents to colours: fitted on the autoencoder itself, once, and without a trace."""

import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch

from cogvx_fast import FastCogVideoXPipeline, demo_checkpoint, preview
from cogvx_fast.preview import LatentPreview
from tests import toy
from tests.previews import fits, generate, made  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def demo():
    pipe = FastCogVideoXPipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def colours(pixels, of):
    """Mean colours in 0 to 1, `(batch, latent frames, height, width, 3)`, of decoded pixels `(batch, 3, ...)`."""
    pixels = pixels.float().clamp(-1, 1).add(1).div(2)
    blocks = pixels.unflatten(4, (-1, 8)).unflatten(3, (-1, 8)).mean((4, 6))
    first, rest = blocks[:, :, :1], blocks[:, :, 1:].unflatten(2, (-1, 4)).mean(3)
    means = torch.cat([first, rest], dim=2).permute(0, 2, 3, 4, 1)
    assert means.shape[:2] == of.shape[:2]
    return means


def psnr(output, expected):
    return -10 * math.log10((output - expected).square().mean().item())


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle moves right",
        "a red circle moves right on a white background",
        "a big yellow star on black",
        "a blue square",
        "a red circle moves right on gray",
        "a blue square on gray",
    ],
)
def test_the_last_steps_picture_is_the_videos(demo, prompt):
    """Found: 21.2 to 24.5 dB, 23.8 to 27.5 but for a tint; the best picture of one colour has 12.4 on black, 19.4 on
    gray. That tint is what an affine map leaves of this autoencoder, whose norms see the whole clip. Maps fitted on
    flat clips, on clips with a flat half and on twice as many were tried: 1.6 dB more on gray at most, as much less on
    pink."""
    pictures = []
    final = demo(
        prompt,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=20,
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, tensors: pictures.append(tensors["preview"]) or {},
        preview=True,
    ).frames
    assert [shown.shape for shown in pictures] == [(1, 5, 16, 16, 3)] * 20
    with torch.no_grad():
        video = colours(demo.decode_latents(final), final)
    last = psnr(pictures[-1] / 255, video)
    assert last > 20
    means = [clip.mean((0, 1, 2, 3)) for clip in (pictures[-1] / 255, video)]
    flat = psnr(means[1].expand(video.shape), video)
    assert last > flat + 3 and psnr(pictures[-1] / 255 - means[0] + means[1], video) > flat + 3
    assert last > psnr(pictures[0] / 255, video)
    assert abs(psnr(demo.preview(final) / 255, video) - last) < 0.5, "the last step's prediction is the result"


def test_the_map_of_the_demo(demo):
    """In its own dtype and in fp32 22.2 dB were found on the clips that it is not fitted on."""
    half = type(demo.vae).from_pretrained(demo_checkpoint(), subfolder="vae", torch_dtype=torch.bfloat16)
    found = LatentPreview.fit(half).decibels, LatentPreview.fit(demo.vae).decibels
    assert min(found) > 21 and abs(found[0] - found[1]) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_map_of_another_dtype_is_the_same_but_for_rounding(dtype, monkeypatch):
    monkeypatch.setattr(preview, "_FITTED", 2)  # float16 takes a CPU long
    exact, fitted = LatentPreview.fit(toy.vae()), LatentPreview.fit(toy.vae().to(dtype))
    assert fitted.weight.dtype == fitted.bias.dtype == torch.float32
    final = torch.randn(1, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    shown, expected = (each.frames(final).float() for each in (fitted, exact))
    assert (shown - expected).abs().mean() < 3 < expected.std()
    assert fitted.frames(final.to(dtype)).shape == (1, 3, 4, 4, 3)


class Affine:
    """An autoencoder of which the best map is known: latents are mean colours, the decoder mixes their channels."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, scaling_factor):
        self.config = SimpleNamespace(scaling_factor=scaling_factor)
        self.mix = torch.tensor([[1.0, 0.2, 0.0], [0.0, 0.8, 0.1], [0.3, 0.0, 0.9], [0.0, 0.0, 0.0]])

    def encode(self, pixels):
        means = colours(pixels, torch.empty(1, 3)).permute(0, 4, 1, 2, 3)
        coded = torch.cat([means, torch.zeros_like(means[:, :1])], dim=1)  # a channel that is not used
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: coded))

    def decode(self, coded):
        pixels = torch.einsum("bcthw,cd->bdthw", coded, self.mix) - 0.25
        pixels = torch.cat([pixels[:, :, :1], pixels[:, :, 1:].repeat_interleave(4, 2)], dim=2)
        return SimpleNamespace(sample=pixels.repeat_interleave(8, 3).repeat_interleave(8, 4))


@pytest.mark.parametrize("scaling_factor", [1.0, 0.7])
def test_a_map_that_is_known_is_found(scaling_factor):
    vae = Affine(scaling_factor)
    fitted = LatentPreview.fit(vae)
    torch.testing.assert_close(fitted.weight, vae.mix / scaling_factor, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fitted.bias, torch.full((3,), -0.25), rtol=1e-4, atol=1e-4)
    assert fitted.decibels > 80


def test_fitting_changes_nothing():
    vae = toy.vae()
    vae.enable_slicing()
    vae.enable_tiling()
    vae.train()
    before = {name: value for name, value in vars(vae).items() if not name.startswith("_")}
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    random = torch.get_rng_state()
    first = LatentPreview.fit(vae)
    assert {name: value for name, value in vars(vae).items() if not name.startswith("_")} == before
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(parameter.grad_fn or parameter.grad is not None for parameter in vae.parameters())
    assert torch.equal(LatentPreview.fit(vae).weight, first.weight), "the same each time"


def test_an_autoencoder_that_is_not_finite_is_refused():
    vae = toy.vae()
    vae.decoder.conv_out.conv.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        LatentPreview.fit(vae)


def test_colours_are_rounded_and_cut_off():
    shown = LatentPreview(torch.eye(3), torch.zeros(3), 0.0).frames(
        torch.tensor([-3.0, -1.0, 0.5, 1.0, 3.0, float("nan"), float("inf")]).view(1, 7, 1, 1, 1).expand(1, 7, 3, 2, 4)
    )
    assert shown.shape == (1, 7, 2, 4, 3) and shown.dtype == torch.uint8
    assert shown[0, :, 1, 2, 0].tolist() == [0, 0, 191, 255, 255, 0, 0]


def test_the_map_is_fitted_once_and_again_when_weights_change(fits):  # noqa: F811
    pipe = made(vae="new")
    final, _ = generate(pipe)
    before = pipe.preview(final)
    other = type(pipe)(**pipe.components)
    other.preview(final)
    assert len(fits) == 1
    for parameter in pipe.vae.parameters():  # as offloading moves them
        parameter.data = parameter.data.clone()
    pipe.preview(final)
    assert len(fits) == 1
    with torch.no_grad():
        pipe.vae.decoder.conv_out.conv.bias[0] += 1
    assert not torch.equal(pipe.preview(final), before) and len(fits) == 2
    pipe.vae.decoder.conv_out.conv.bias.data[0] -= 1  # which torch does not count
    assert torch.equal(pipe.preview(final), before) and len(fits) == 3


def test_the_map_goes_with_its_autoencoder():
    pipe = made(vae="new")
    pipe.preview(torch.zeros(1, 3, 16, 4, 4))
    vae = weakref.ref(pipe.vae)
    kept = len(preview._MAPS)
    assert vae() in preview._MAPS
    del pipe
    gc.collect()
    assert vae() is None and len(preview._MAPS) < kept
