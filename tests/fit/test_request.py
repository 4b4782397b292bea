"""The size of a generation, read off a pipeline's call."""

import diffusers
import torch

from cogvx_fast.fit.request import Request
from tests import toy

CONFIG = toy.transformer().config


def of(cls="CogVideoXPipeline", **arguments):
    return Request.of_call(CONFIG, getattr(diffusers, cls), arguments)


def test_a_call_without_a_size_makes_the_models_own():
    request = of(prompt="a cat")
    assert (request.num_frames, request.height, request.width) == (toy.NUM_FRAMES, toy.SIZE, toy.SIZE)
    assert (request.videos, request.guided, request.encodes, request.streams) == (1, True, 0, False)


def test_arguments_count():
    request = of(prompt=["a", "b"], height=48, width=64, num_frames=17, guidance_scale=1.0, output_type="latent")
    assert str(request) == "2 videos of 17 frames of 64x48" and not request.guided and request.streams
    assert request.latents == (5, 6, 8) and request.video_tokens(2, None) == 60 and request.video_tokens(2, 2) == 36
    assert of(prompt_embeds=torch.zeros(3, 16, 32)).videos == 3


def test_videos_are_counted():
    for video in ([object()] * 5, [[object()] * 5], torch.zeros(1, 5, 3, 8, 8), torch.zeros(5, 3, 8, 8)):
        request = of("CogVideoXVideoToVideoPipeline", video=video)
        assert (request.num_frames, request.encodes) == (5, 5)
    assert of("CogVideoXFunControlPipeline", control_video=[[object()] * 5]).encodes == 5
    assert of("CogVideoXImageToVideoPipeline", num_frames=9).encodes == 1


def test_cogvideox_1_5_has_a_size_of_its_own():
    config = {**CONFIG, "sample_height": 300, "sample_width": 300, "sample_frames": 81, "patch_size_t": 2}
    request = Request.default(config)
    assert (request.num_frames, request.height, request.width) == (81, 768, 1360)
    # 81 frames are 21 of latents, filled up to 22: 45,106 tokens with the text's 226.
    assert request.video_tokens(2, 2) == 44880
