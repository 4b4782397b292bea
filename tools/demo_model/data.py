"""Procedural clips of one coloured shape that moves over a plain background, and sentences about them.

A `Scene` is one of 480 combinations of shape, colour, background and motion. `HELD_OUT` is a fixed
sixth of them that no training stage ever sees: held-out clips measure the autoencoder, held-out
prompts measure the whole model.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cogvx_fast.family import FRAMES_PER_LATENT
from cogvx_fast.family import PIXELS_PER_LATENT as CELL

SIZE = 128  # pixels, height and width
SMALL = 64  # of the first stages of training, which the lengths below are of
NUM_FRAMES = 17
FPS = 8

COLORS = {
    "red": (220, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (245, 225, 60),
    "green": (40, 170, 70),
    "blue": (40, 90, 220),
    "purple": (145, 60, 190),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "pink": (250, 185, 205),
}
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}

# Circumradius in units of the scene's radius: keeps the areas of the four shapes comparable.
_CIRCUMRADIUS = {"circle": 1.0, "square": 1.25, "triangle": 1.4, "star": 1.45}
_STAR_INNER = 0.5
_EDGE = 2.0  # width in pixels over which an edge fades, so that sub-pixel motion is visible
_RADIUS, _TRAVEL = 14.0, 19.0  # pixels: as large as leaves the star room to move; shapes are told apart by their size


@dataclass(frozen=True)
class Scene:
    shape: str
    color: str
    background: str
    motion: str


ALL_SCENES = tuple(Scene(*c) for c in itertools.product(SHAPES, COLORS, BACKGROUNDS, MOTIONS))
HELD_OUT = tuple(random.Random(20).sample(ALL_SCENES, len(ALL_SCENES) // 6))
TRAINING = tuple(s for s in ALL_SCENES if s not in set(HELD_OUT))


# --- sentences ---------------------------------------------------------------------------------

_SHAPE_NAMES = {
    "circle": ("circle", "circle", "disc", "ball"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
}
_COLOR_NAMES = {"purple": ("purple", "purple", "violet")}
_BACKGROUND_NAMES = {"gray": ("gray", "grey")}
_MOVES = ("moves", "moves", "is moving", "moving", "slides", "sliding", "drifts", "drifting", "goes", "travels")
_DIRECTIONS = {
    "left": ("left", "left", "to the left", "leftwards"),
    "right": ("right", "right", "to the right", "rightwards"),
    "up": ("up", "up", "upwards", "to the top"),
    "down": ("down", "down", "downwards", "to the bottom"),
}
_STILL = ("stays still", "stays still", "stands still", "does not move", "is not moving", "rests", "without moving")
_GROUNDS = (
    "on a {} background",
    "on a {} background",
    "on {}",
    "over a {} background",
    "in front of a {} background",
    "across a {} backdrop",
    "against a {} backdrop",
)


def describe(scene: Scene, rng: random.Random) -> str:
    """One of the many sentences that describe `scene`, chosen by `rng`."""
    shape = rng.choice(_SHAPE_NAMES[scene.shape])
    color = rng.choice(_COLOR_NAMES.get(scene.color, (scene.color,)))
    background = rng.choice(_BACKGROUND_NAMES.get(scene.background, (scene.background,)))

    subject = rng.choice(("a {} {}", "a {} {}", "a {} {}", "the {} {}", "{} {}", "one {} {}")).format(color, shape)
    if rng.random() < 0.1:
        subject = f"{rng.choice(('a', 'the'))} {shape} in {color}"
    if scene.motion == "still":
        action = rng.choice(_STILL)
    else:
        action = f"{rng.choice(_MOVES)} {rng.choice(_DIRECTIONS[scene.motion])}"
    ground = rng.choice(_GROUNDS).format(background)

    order = rng.random()
    if order < 0.65:
        return f"{subject} {action} {ground}"
    if order < 0.8:
        return f"{ground}, {subject} {action}"
    if order < 0.9:
        return f"{subject} {ground}, {action}"
    return f"{subject} {action}, {background} background"


# --- pictures ----------------------------------------------------------------------------------


def polygon(shape: str) -> torch.Tensor:
    """Vertices (V, 2) of a polygon of circumradius 1 around the origin, y pointing down."""
    if shape == "square":
        angles, radii = [math.pi / 4 + i * math.pi / 2 for i in range(4)], [1.0] * 4
    elif shape == "triangle":
        angles, radii = [-math.pi / 2 + i * 2 * math.pi / 3 for i in range(3)], [1.0] * 3
    elif shape == "star":
        angles = [-math.pi / 2 + i * math.pi / 5 for i in range(10)]
        radii = [1.0, _STAR_INNER] * 5
    else:
        raise ValueError(f"shape={shape!r} is no polygon; there are 'square', 'triangle' and 'star'")
    return torch.tensor([[r * math.cos(a), r * math.sin(a)] for a, r in zip(angles, radii, strict=True)])


def signed_distance(points: torch.Tensor, shape: str, radius: float) -> torch.Tensor:
    """Distance in pixels from `points` (..., 2) to the outline of `shape`, negative inside.

    For polygons: the least distance to an edge, with the sign of the even-odd crossing rule.
    """
    radius = radius * _CIRCUMRADIUS[shape]
    if shape == "circle":
        return points.norm(dim=-1) - radius
    vertices = polygon(shape) * radius
    ends = vertices.roll(-1, dims=0)
    edges = ends - vertices
    relative = points.unsqueeze(-2) - vertices
    along = ((relative * edges).sum(-1) / edges.square().sum(-1)).clamp(0, 1)
    distance = (relative - along.unsqueeze(-1) * edges).norm(dim=-1).amin(-1)
    x, y = points[..., None, 0], points[..., None, 1]
    straddles = (vertices[:, 1] > y) != (ends[:, 1] > y)
    slope = edges[:, 0] / torch.where(edges[:, 1] == 0, torch.ones_like(edges[:, 1]), edges[:, 1])
    crosses = straddles & (x < vertices[:, 0] + (y - vertices[:, 1]) * slope)
    inside = crosses.sum(-1) % 2 == 1
    return torch.where(inside, -distance, distance)


def coverage(shape: str, radius: float, centers: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """How much of each pixel the shape covers: (F, size, size) in [0, 1] for centres (F, 2) in pixels."""
    axis = torch.arange(size, dtype=torch.float32) + 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (y, x, 2) holding (x, y)
    points = grid[None] - centers[:, None, None, :]
    return (0.5 - signed_distance(points, shape, radius) / _EDGE).clamp(0, 1)


def path(
    scene: Scene, rng: random.Random, num_frames: int = NUM_FRAMES, size: int = SIZE, jitter: float | None = 1.0
) -> tuple[float, torch.Tensor]:
    """A random radius and the centres (num_frames, 2) of a straight path that stays inside the picture.

    `jitter`: how much of the full variety in size, speed and place is used, 0 to 1. With None, what is drawn fits the
    latents: of one size, at a place of whole cells, a cell further with each latent frame.
    """
    scale = size / SMALL
    if jitter is None:
        middle = [rng.choice(places) for places in middles(scene, size)]
        return _RADIUS * scale, _centers_on_cells(scene, middle, num_frames)
    direction = torch.tensor(MOTIONS[scene.motion], dtype=torch.float32)
    radius = (_RADIUS + jitter * rng.uniform(-1.5, 1.5)) * scale
    travel = (_TRAVEL + jitter * rng.uniform(-2.0, 2.0)) * scale
    reach = radius * _CIRCUMRADIUS[scene.shape]
    middle = torch.tensor(
        [
            size / 2 + jitter * rng.uniform(-1, 1) * max(0.0, min(9.0 * scale, size / 2 - reach - abs(d) * travel / 2))
            for d in direction.tolist()
        ]
    )
    steps = torch.linspace(-0.5, 0.5, num_frames)[:, None]
    return radius, middle + steps * travel * direction


def _travel_on_cells(num_frames: int) -> float:
    return (num_frames - 1) / FRAMES_PER_LATENT * CELL


def middles(scene: Scene, size: int = SIZE) -> list[list[float]]:
    """The x and the y that the middle of a path may have of what fits the latents.

    They are the picture's own, and a cell to either side where there is room.
    """
    reach = _RADIUS * size / SMALL * _CIRCUMRADIUS[scene.shape]
    found = []
    for moves in MOTIONS[scene.motion]:
        fits = reach + abs(moves) * _travel_on_cells(NUM_FRAMES) / 2 + CELL <= size / 2
        found.append([size / 2 + CELL * cells for cells in ((-1, 0, 1) if fits else (0,))])
    return found


def _centers_on_cells(scene: Scene, middle: Sequence[float], num_frames: int) -> torch.Tensor:
    """Centres (num_frames, 2) of a path that moves by a cell with each latent frame."""
    steps = torch.linspace(-0.5, 0.5, num_frames)[:, None]
    direction = torch.tensor(MOTIONS[scene.motion], dtype=torch.float32)
    return torch.tensor(middle) + steps * _travel_on_cells(num_frames) * direction


def all_on_cells(scene: Scene, size: int = SIZE) -> torch.Tensor:
    """Every clip of `scene` that fits the latents, (n, 3, NUM_FRAMES, size, size) in [-1, 1]."""
    radius = _RADIUS * size / SMALL
    places = itertools.product(*middles(scene, size))
    return torch.stack([_paint(scene, radius, _centers_on_cells(scene, middle, NUM_FRAMES), size) for middle in places])


def render(
    scene: Scene, rng: random.Random, num_frames: int = NUM_FRAMES, size: int = SIZE, jitter: float | None = 1.0
) -> torch.Tensor:
    """A clip of `scene`, (3, num_frames, size, size) in [-1, 1], with random size, speed and place, or those of the
    latents (`jitter` as in `path`).

    Shorter clips are random windows of the full-length path, so that speeds stay the same.
    """
    radius, centers = path(scene, rng, max(num_frames, NUM_FRAMES), size, jitter)
    start = rng.randrange(0, len(centers) - num_frames + 1, FRAMES_PER_LATENT if jitter is None else 1)
    return _paint(scene, radius, centers[start : start + num_frames], size)


def _paint(scene: Scene, radius: float, centers: torch.Tensor, size: int) -> torch.Tensor:
    """A clip (3, frames, size, size) in [-1, 1]."""
    alpha = coverage(scene.shape, radius, centers, size)[None]
    color = torch.tensor(COLORS[scene.color]).view(3, 1, 1, 1) / 127.5 - 1
    background = torch.tensor(BACKGROUNDS[scene.background]).view(3, 1, 1, 1) / 127.5 - 1
    return background + alpha * (color - background)
