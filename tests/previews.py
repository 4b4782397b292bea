"""Generations with previews, for the tests of their maps and of their pictures."""

import functools

import pytest

from cogvx_fast import accelerate
from cogvx_fast.preview import LatentPreview
from tests import toy
from tests.dropin.generations import picture

CLIP = [picture()] * toy.NUM_FRAMES
# What a call of each pipeline takes besides.
EXTRA = {
    "2b": {},
    "5b-i2v": {"image": picture()},
    "1.5-5b": {},
    "1.5-5b-i2v": {"image": picture()},
    "fun": {"control_video": CLIP},
    "video": {"video": CLIP, "strength": 0.7},
}


@functools.cache
def autoencoder():
    """The toys' own, ours by now: most tests share it, as to fit takes a second."""
    return accelerate(toy.pipeline()).vae


def made(variant="2b", vae=None, **options):
    """A fast pipeline, with the autoencoder that tests share or, with `vae="new"`, one of its own."""
    cls = {"cls": "CogVideoXVideoToVideoPipeline"} if variant == "video" else {}
    pipe = accelerate(toy.pipeline("2b" if variant == "video" else variant, **cls, **options))
    if vae is None:
        pipe.vae = autoencoder()
    return pipe


def generate(pipe, variant="2b", callback=None, **overrides):
    """The final latents of a short generation with previews, and the pictures of its steps."""
    pictures = []

    def each(pipe, step, timestep, tensors):
        pictures.append(tensors["preview"])
        return tensors if callback is None else callback(pipe, step, timestep, tensors)

    options = {"output_type": "latent", "callback_on_step_end": each, "preview": True, **EXTRA[variant], **overrides}
    inputs = toy.inputs(**options)
    if variant in ("fun", "video"):
        inputs.pop("num_frames")
    return pipe(**inputs).frames, pictures


@pytest.fixture
def fits(monkeypatch):
    """The autoencoders that were fitted."""
    found, fit = [], LatentPreview.fit

    def counted(vae, device=None):
        found.append(vae)
        return fit(vae, device)

    monkeypatch.setattr(LatentPreview, "fit", counted)
    return found
