"""What the page may offer of a model: its defaults, its limits and sentences that suit it."""

from __future__ import annotations

from typing import Any

from cogvx_fast.cli.validate import MAX_GUIDANCE
from cogvx_fast.demo import is_demo
from cogvx_fast.video import max_fps

from . import references
from .orders import DEFAULT_GUIDANCE, DEFAULT_STEPS, DEFAULT_STRENGTH, SCHEDULERS, Served

_EXAMPLES = (
    "A panda plays a guitar by a stream in a bamboo forest, soft morning light",
    "Waves break on black rocks at sunset, slow motion, seen from above",
    "A paper boat drifts along a rainy street, neon lights reflect in the water",
    "A golden retriever in a sunny garden shakes water out of its fur, close-up",
)
# The demo model knows one kind of scene (tools/demo_model/README.md has its grammar).
_DEMO_EXAMPLES = (
    "a red circle moves right on a white background",
    "a blue star moves up on a gray background",
    "on a pink background, a green square slides left",
    "a purple triangle stays still on black",
)
_DEMO_GUIDANCE = 1.5  # more of it makes the outlines of its shapes bulge
_LONGEST = 2  # times the model's own length that the page offers


def about(served: Served) -> dict[str, Any]:
    """The fields of a request as the model has them: sizes in pixels, lengths in frames. Costs next to nothing."""
    checkpoint = served.checkpoint
    variant = checkpoint.variant
    height, width = variant.default_size
    max_height, max_width = variant.largest_size or (None, None)
    fixed = variant.use_learned_positional_embeddings
    of_demo = is_demo(checkpoint.source)
    needs_picture = variant.in_channels != variant.out_channels
    period, own = variant.frame_period, variant.sample_frames
    lengths = {own} if fixed else {own, *range(period + 1, _LONGEST * own + 1, period)}
    return {
        "id": served.name,
        "task": "image-to-video" if needs_picture else "text-to-video",
        "width": width,
        "height": height,
        "multiple": variant.pixels_per_token,
        "max_width": max_width,
        "max_height": max_height,
        "fixed_size": fixed,
        "num_frames": own,
        "frame_choices": sorted(lengths),
        "fps": variant.default_fps,
        "max_fps": max_fps("video.gif"),
        "num_inference_steps": DEFAULT_STEPS,
        "max_steps": checkpoint.num_train_timesteps,
        "guidance_scale": _DEMO_GUIDANCE if of_demo else DEFAULT_GUIDANCE,
        "max_guidance": MAX_GUIDANCE,
        "engines": [served.tier],
        "schedulers": list(SCHEDULERS),
        "reference": {
            "kinds": ["image"] if needs_picture else ["video"],
            "required": needs_picture,
            "max_bytes": references.MAX_BYTES,
            "strength": DEFAULT_STRENGTH,
        },
        "examples": list(_DEMO_EXAMPLES if of_demo else _EXAMPLES),
    }
