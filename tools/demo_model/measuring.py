"""How well a clip is drawn: how near its object is to an ideal shape, how flat its ground, how steady its size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .data import BACKGROUNDS, COLORS, Scene, coverage, signed_distance

_NEAR = 6.0  # pixels from the outline that still belong to it
_HALVINGS = 6  # of the steps by which a shape is fitted


@dataclass(frozen=True)
class Drawing:
    """Of a clip whose scene is known.

    Attributes:
        overlap: of the object's pixels with those of the best-fitting ideal shape of its kind, intersection over union;
            mean over frames.
        least_overlap: of the worst frame.
        ground_spread: standard deviation of the ground within a frame, of values from 0 to 1; the worst frame's.
        area_spread: the furthest that the object's area is from its mean over the clip, as a part of it.
    """

    overlap: float
    least_overlap: float
    ground_spread: float
    area_spread: float


def measure(clip: torch.Tensor, scene: Scene) -> Drawing:
    """Of a clip `(frames, 3, size, size)`, RGB in [0, 1].

    How much of a pixel is object is read off its colour: where it lies between those of ground and object. Where that
    is more than half, the pixel is the object's: a tint of either is no error of the outline.
    """
    ground, color = (
        torch.tensor(palette[name]).view(3, 1, 1) / 255
        for palette, name in ((BACKGROUNDS, scene.background), (COLORS, scene.color))
    )
    axis = color - ground
    alpha = (((clip - ground) * axis).sum(1) / axis.square().sum()).clamp(0, 1)  # (frames, size, size)
    overlaps, spreads = [], []
    for frame, pixels in zip(alpha, clip, strict=True):
        overlap, radius, center = fit(frame > 0.5, scene.shape)
        overlaps.append(overlap)
        outside = signed_distance(_grid(frame.shape[-1]) - center, scene.shape, radius) > _NEAR
        spreads.append(pixels[:, outside].std(dim=1).max().item())
    areas = alpha.flatten(1).sum(1)
    return Drawing(
        overlap=sum(overlaps) / len(overlaps),
        least_overlap=min(overlaps),
        ground_spread=max(spreads),
        area_spread=((areas / areas.mean()) - 1).abs().max().item(),
    )


def fit(mask: torch.Tensor, shape: str) -> tuple[float, float, torch.Tensor]:
    """The ideal shape that overlaps most with `mask` `(size, size)`: the overlap, its radius and centre in pixels.

    It begins with that of the same area and centre, and moves each by ever smaller steps while that is better.
    """
    area = mask.sum().clamp(min=1.0)
    center = (_grid(mask.shape[-1]) * mask[..., None]).sum((0, 1)) / area
    unit = coverage(shape, 10.0, torch.tensor([[32.0, 32.0]]), 64)[0].sum()
    found = torch.tensor([10.0 * (area / unit).sqrt().item(), *center.tolist()])  # radius, x, y
    best, step = _overlap(mask, shape, found), 2.0
    for _ in range(_HALVINGS):
        better = True
        while better:
            better = False
            for index in range(3):
                for sign in (-1.0, 1.0):
                    tried = found.clone()
                    tried[index] += sign * step
                    overlap = _overlap(mask, shape, tried)
                    if overlap > best:
                        found, best, better = tried, overlap, True
        step /= 2
    return best, found[0].item(), found[1:]


def _overlap(mask: torch.Tensor, shape: str, at: torch.Tensor) -> float:
    ideal = coverage(shape, at[0].clamp(min=1.0).item(), at[None, 1:], mask.shape[-1])[0] > 0.5
    return ((mask & ideal).sum() / (mask | ideal).sum().clamp(min=1)).item()


def _grid(size: int) -> torch.Tensor:
    axis = torch.arange(size, dtype=torch.float32) + 0.5
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
