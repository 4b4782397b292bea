"""Reads a clip back: which background, which colour, which shape, and where it went."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .data import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene, coverage

STILL_BELOW = 5.0  # pixels of a 64-pixel picture, first to last frame
MOVES_ABOVE = 10.0


@dataclass(frozen=True)
class Reading:
    """What a clip shows; `unclear` where it shows nothing nameable."""

    shape: str
    color: str
    background: str
    motion: str

    def matches(self, scene: Scene) -> dict[str, bool]:
        return {
            name: getattr(self, name) == getattr(scene, name) for name in ("background", "color", "shape", "motion")
        }


def read(clip: torch.Tensor) -> Reading:
    """What a clip (frames, 3, size, size), RGB in [0, 1], shows.

    Background: the median of the outer two rows and columns. Object: the pixels more than half as far
    from the background as the object's own colour is. Shape: the template of equal area and centre that
    overlaps best, by majority over frames. Motion: the way of the centre from the first to the last frame.
    """
    size = clip.shape[-1]
    border = torch.cat([clip[..., :2, :].flatten(2), clip[..., -2:, :].flatten(2), clip[..., :2].flatten(2)], dim=2)
    background = border.transpose(0, 1).flatten(1).median(dim=1).values  # (3,)
    distance = (clip - background.view(1, 3, 1, 1)).norm(dim=1)  # (frames, size, size)
    strongest = distance >= 0.7 * distance.flatten().quantile(0.995)
    color = clip.transpose(0, 1)[:, strongest].median(dim=1).values
    mask = distance > 0.5 * (color - background).norm()

    areas = mask.flatten(1).sum(1)
    visible = areas >= 0.01 * size * size
    if (color - background).norm() < 0.1 or visible.float().mean() < 0.7:
        return Reading("unclear", "unclear", _nearest(background, BACKGROUNDS), "unclear")
    axis = torch.arange(size, dtype=torch.float32) + 0.5
    x = (mask.sum(1) * axis).sum(1)[visible] / areas[visible]
    y = (mask.sum(2) * axis).sum(1)[visible] / areas[visible]
    centers = torch.stack([x, y], dim=1)
    shapes = [_shape(frame.float(), center) for frame, center in zip(mask[visible], centers, strict=True)]
    return Reading(
        shape=max(SHAPES, key=shapes.count),
        color=_nearest(color, COLORS),
        background=_nearest(background, BACKGROUNDS),
        motion=_motion((centers[-1] - centers[0]) * 64 / size),
    )


def _nearest(color: torch.Tensor, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: (torch.tensor(palette[name]) / 255 - color).norm().item())


def _motion(way: torch.Tensor) -> str:
    if way.norm() < STILL_BELOW:
        return "still"
    major = way.abs().argmax()
    if way[major].abs() < MOVES_ABOVE or way[1 - major].abs() > 0.5 * way[major].abs():
        return "unclear"
    return max(MOTIONS, key=lambda name: (torch.tensor(MOTIONS[name], dtype=torch.float32) @ way).item())


def _shape(mask: torch.Tensor, center: torch.Tensor) -> str:
    overlaps = {}
    for shape in SHAPES:
        unit = coverage(shape, 10.0, torch.tensor([[32.0, 32.0]]))[0].sum()
        radius = 10.0 * (mask.sum() / unit).sqrt().item()
        template = coverage(shape, radius, center[None], mask.shape[-1])[0]
        overlaps[shape] = (torch.minimum(mask, template).sum() / torch.maximum(mask, template).sum()).item()
    return max(overlaps, key=overlaps.get)
