"""The gate of servers: what rounding makes of a video behind the writer is right, what a defect makes is not."""

import pytest
import torch
from diffusers import CogVideoXPipeline

from cogvx_fast import FastCogVideoXPipeline, demo_checkpoint
from cogvx_fast.bench.accuracy import relative_error
from cogvx_fast.bench.serving_gate import compare, disturbed
from cogvx_fast.video import write_video

pytestmark = pytest.mark.slow

FIELDS = {"width": 64, "height": 64, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 6.0, "fps": 8}
REQUESTS = [
    {"prompt": "a red circle moving right on a blue background", "seed": 1, **FIELDS},
    {"prompt": "a white square moving up on a green background", "seed": 2, **FIELDS},
]


def made_by(pipe, tmp_path, **changes):
    pipe.set_progress_bar_config(disable=True)
    videos = []
    for asked in REQUESTS:
        fields = {name: value for name, value in {**asked, **changes}.items() if name not in ("seed", "fps")}
        images = pipe(**fields, generator=torch.Generator().manual_seed(asked["seed"])).frames[0]
        videos.append(write_video(images, tmp_path / "video.mp4", asked["fps"], repeatable=True).read_bytes())
    return videos


def test_only_what_rounding_can_make_is_right(tmp_path):
    plain = CogVideoXPipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    fast = FastCogVideoXPipeline.from_pretrained(demo_checkpoint(), torch_dtype=torch.float32)
    baseline, ours = made_by(plain, tmp_path), made_by(fast, tmp_path)
    judged = compare(demo_checkpoint(), "float32", REQUESTS, ours, baseline)
    assert judged.ours.gate == judged.baseline.gate == "green", judged
    for wrong in ({"guidance_scale": 6.5}, {"num_inference_steps": 5}):
        judged = compare(demo_checkpoint(), "float32", REQUESTS, made_by(fast, tmp_path, **wrong), baseline)
        assert judged.ours.gate == "red" and judged.baseline.gate == "green", (wrong, judged)


def test_noise_is_as_large_as_is_asked():
    exact = torch.rand(3, 4, 5, 3, dtype=torch.float64)
    first, second = disturbed(exact, 1e-6, 0), disturbed(exact, 1e-6, 1)
    assert relative_error(first, exact) == pytest.approx(1e-6) == relative_error(second, exact)
    assert not torch.equal(first, second) and torch.equal(first, disturbed(exact, 1e-6, 0))
