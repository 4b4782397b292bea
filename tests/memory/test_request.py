"""The size of a generation, read off a pipeline's call."""

import diffusers
import torch

from cogvx_fast.family import Variant
from cogvx_fast.memory import Request
from tests import toy

VARIANT = Variant.of(toy.transformer().config)


def of(cls="CogVideoXPipeline", **arguments):
    return Request.of_call(VARIANT, getattr(diffusers, cls), arguments)


def test_a_call_without_a_size_makes_the_models_own():
    request = of(prompt="a cat")
    assert (request.num_frames, request.height, request.width) == (toy.NUM_FRAMES, toy.SIZE, toy.SIZE)
    assert (request.videos, request.guided, request.encodes, request.streams) == (1, True, 0, False)


def test_arguments_count():
    request = of(prompt=["a", "b"], height=48, width=64, num_frames=17, guidance_scale=1.0, output_type="latent")
    assert str(request) == "2 videos of 17 frames of 64x48" and not request.guided and request.streams
    assert request.latents == (5, 6, 8)
    assert of(prompt_embeds=torch.zeros(3, 16, 32)).videos == 3


def test_videos_are_counted():
    for video in ([object()] * 5, [[object()] * 5], torch.zeros(1, 5, 3, 8, 8), torch.zeros(5, 3, 8, 8)):
        request = of("CogVideoXVideoToVideoPipeline", video=video)
        assert (request.num_frames, request.encodes) == (5, 5)
    assert of("CogVideoXFunControlPipeline", control_video=[[object()] * 5]).encodes == 5
    assert of("CogVideoXImageToVideoPipeline", num_frames=9).encodes == 1


def test_defaults_are_the_variants_and_a_call_takes_the_configuration_at_its_word():
    large = Variant(patch_size_t=2, sample_frames=81, sample_height=300, sample_width=300, max_text_seq_length=224)
    request = Request.default(large, steps=20)
    assert request == Request(81, 768, 1360, text_tokens=224, steps=20)
    called = Request.of_call(large, diffusers.CogVideoXPipeline, {})
    assert (called.num_frames, called.height, called.width) == (81, 2400, 2400)


def test_the_least_is_a_frame_of_the_same_resolution():
    request = Request.default(VARIANT, diffusers.CogVideoXVideoToVideoPipeline, videos=2)
    assert request.encodes == 9 and request.of_frames(5).encodes == 5
    least = Request(1, toy.SIZE, toy.SIZE, toy.TEXT_LENGTH, guided=False, steps=1, encodes=1, streams=True)
    assert request.least == least
    assert Request.of_decoding(9, 32, 32).least.steps == 0


def test_the_models_own_size_is_known():
    assert Request.default(VARIANT).has_size_of(VARIANT)
    assert not Request.default(VARIANT, height=48).has_size_of(VARIANT)
