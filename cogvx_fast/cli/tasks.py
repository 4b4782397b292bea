"""What a checkpoint can be asked for: which pipeline makes it, of which pictures and videos. JSON alone decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import ARGUMENT as MODEL
from .checkpoint import Checkpoint
from .console import UsageError

# Of each argument, which checkpoints take it.
_WHO = {
    "--image": "an image-to-video checkpoint such as THUDM/CogVideoX-5b-I2V, or one of CogVideoX-Fun InP",
    "--last-image": "a CogVideoX-Fun checkpoint for first and last frames (InP)",
    "--video": "a text-to-video checkpoint such as THUDM/CogVideoX-2b or -5b",
    "--control-video": "a control checkpoint of CogVideoX-Fun",
}


@dataclass(frozen=True)
class Task:
    """What is made.

    Attributes:
        pipeline: the name of our class.
        what: in words.
        takes: arguments of the command beside the text, and by which names the pipeline knows them.
        needs: those of them that must be there.
        takes_frames: whether the pipeline is told how many frames to make; else the video that it is given says so.
    """

    pipeline: str
    what: str
    takes: Mapping[str, str]
    needs: tuple[str, ...] = ()
    takes_frames: bool = True


TEXT = Task("FastCogVideoXPipeline", "text to video", {})
VIDEO = Task(
    "FastCogVideoXVideoToVideoPipeline", "video to video", {"--video": "video"}, ("--video",), takes_frames=False
)
IMAGE = Task("FastCogVideoXImageToVideoPipeline", "image to video", {"--image": "image"}, ("--image",))
CONTROL = Task(
    "FastCogVideoXFunControlPipeline",
    "control video to video",
    {"--control-video": "control_video"},
    ("--control-video",),
    takes_frames=False,
)
INPAINT = Task(
    "FastCogVideoXFunInpaintPipeline",
    "first and last frame to video",
    {"--image": "image", "--last-image": "last_image"},
)


def choose(checkpoint: Checkpoint, given: Mapping[str, Path | None]) -> Task:
    """What a checkpoint makes of the arguments that are given.

    Args:
        given: by the names of `_WHO`; None for what is not.

    Raises:
        UsageError: for an argument that the checkpoint does not take, with one that does, and for one that is missing.
    """
    there = [name for name, value in given.items() if value is not None]
    possible = _possible(checkpoint)
    # The task that takes all that is given; the one that needs most of it, where there are several.
    fitting = [task for task in possible if all(name in task.takes for name in there)]
    fitting.sort(key=lambda task: -sum(name in there for name in task.needs))
    source = repr(checkpoint.source)
    if not fitting:
        wrong = next(name for name in there if not any(name in task.takes for task in possible))
        makes = " or ".join(task.what for task in possible)
        raise UsageError(wrong, repr(str(given[wrong])), f"needs {_WHO[wrong]}; {source} makes {makes}")
    task = fitting[0]
    missing = [name for name in task.needs if name not in there]
    if missing:
        raise UsageError(missing[0], None, f"is missing: {source} makes {' or '.join(t.what for t in fitting)}")
    return task


def _possible(checkpoint: Checkpoint) -> list[Task]:
    variant = checkpoint.variant
    given, made = variant.in_channels, variant.out_channels
    if given == made:
        # CogVideoX 1.5 makes videos of text alone: diffusers' pipeline of videos does not pad its frames.
        return [TEXT] if variant.patch_size_t is not None else [TEXT, VIDEO]
    if given == 2 * made + 1:
        return [INPAINT]
    if given == 2 * made:
        # Both have the same shapes; the checkpoint's own name tells them apart, where it is one of the two.
        named = [task for task in (IMAGE, CONTROL) if task.pipeline == f"Fast{checkpoint.pipeline_class}"]
        return named or [IMAGE, CONTROL]
    raise UsageError(
        MODEL, repr(checkpoint.source), f"has in_channels {given} and out_channels {made}: none of the family's kinds"
    )
