"""Which pipeline a member of the family is for. Upstream fails on a shape after minutes, or gives noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..family import Variant

_TEXT, _IMAGE, _VIDEO, _CONTROL, _INPAINT = (
    f"CogVideoX{kind}Pipeline" for kind in ("", "ImageToVideo", "VideoToVideo", "FunControl", "FunInpaint")
)


def why_not(pipeline: str, transformer: Mapping[str, Any], own: str | None = None) -> str | None:
    """Why `pipeline`, a name of one of the family's classes, cannot run a transformer of this configuration, and
    what can; None if it can, or is another class.

    Args:
        own: the class that the checkpoint names for itself, which tells image-to-video from control: both have the
            same shapes.
    """
    if pipeline not in (_TEXT, _IMAGE, _VIDEO, _CONTROL, _INPAINT):
        return None
    variant = Variant.of(transformer)
    given, made = variant.in_channels, variant.out_channels
    if given == made:
        what, takes = "makes videos of text alone", [_TEXT, _VIDEO]
    elif given == 2 * made + 1:
        what, takes = "is of the Fun family for first and last frames (InP)", [_INPAINT]
    elif given == 2 * made:
        what, takes = "makes videos of an image or of a control video, and text", [_IMAGE, _CONTROL]
        if own in takes:
            takes = [own]
        what = {_IMAGE: "makes videos of an image and text", _CONTROL: "follows a control video (CogVideoX-Fun)"}.get(
            own or "", what
        )
    else:
        what, takes = "is none of the family's kinds", []
    if variant.patch_size_t is not None and _VIDEO in takes:
        what, takes = "is a CogVideoX 1.5, which makes videos of text alone", [_TEXT]
    if pipeline in takes:
        return None
    other = " or ".join(f"Fast{name}" for name in takes) or "no pipeline here"
    return f"its transformer (in_channels {given}, out_channels {made}) {what}: {other} takes it, not Fast{pipeline}"
