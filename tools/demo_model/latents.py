"""What the denoisers are trained on, made by the autoencoder once and kept on disk.

Clip `i` is a function of `i` alone. The second checkpoint is also told the first frame, the last, both or neither, in
the form of CogVideoX-Fun's InP checkpoints (`cogvx_fast.fun.conditions`).
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX

from cogvx_fast.fun.conditions import mask_latents

from .data import TRAINING, Scene, render
from .state import load_state, save_state
from .vae import bf16_where_fast, memory_format, scaling_factor

JITTER = 0.4  # variety of the clips, see `data.path`
BLACK = -1.0  # what an unknown pixel is
KNOWN = {"first": (0,), "last": (-1,), "both": (0, -1)}


class LatentCache:
    """Scaled latents of training clips, (N, 5, 16, size / 8, size / 8), made on demand.

    Their scale is `scale`, or what the clips themselves say.
    """

    def __init__(
        self,
        vae: AutoencoderKLCogVideoX,
        path: Path,
        size: int,
        scale: float | None = None,
        jitter: float | None = JITTER,
    ):
        self.vae, self.path, self.size, self.jitter = vae, path, size, jitter
        state = load_state(path) or {"scale": scale or scaling_factor(vae), "latents": None}
        self.scale: float = state["scale"]
        self.latents: torch.Tensor | None = state["latents"]

    def __len__(self) -> int:
        return 0 if self.latents is None else len(self.latents)

    @staticmethod
    def scene(index: int) -> Scene:
        """Scenes in turn, in an order that mixes all factors early."""
        return TRAINING[(index * 149) % len(TRAINING)]

    def clip(self, index: int) -> torch.Tensor:
        return render(self.scene(index), random.Random(f"clip {index}"), size=self.size, jitter=self.jitter)

    @torch.no_grad()
    def grow(self, size: int) -> None:
        while len(self) < size:
            indices = range(len(self), min(len(self) + 16, size))
            made = self.made_of(torch.stack([self.clip(i) for i in indices]), indices)
            self.latents = made if self.latents is None else torch.cat([self.latents, made])
            if len(self) % 400 == 0:
                print(f"{self.path.stem} {len(self)}", flush=True)
                self.save()

    def made_of(self, clips: torch.Tensor, indices: range) -> torch.Tensor:
        """What is kept of clips `(n, 3, frames, size, size)`, which are those of `indices`."""
        return self.encode(clips)

    def encode(self, clips: torch.Tensor) -> torch.Tensor:
        """Scaled latents `(n, latent frames, 16, size / 8, size / 8)`."""
        with bf16_where_fast():
            mean = self.vae.encode(clips.contiguous(memory_format=memory_format())).latent_dist.mode()
        return mean.float().transpose(1, 2).contiguous() * self.scale

    def save(self) -> None:
        save_state(self.path, {"scale": self.scale, "latents": self.latents})


class KnownCache(LatentCache):
    """The 17 channels beside the noisy latents of the same clips, (N, 3, 5, 17, size / 8, size / 8), in float16.

    The second dimension is which frames are known: those of `KNOWN`, in its order.
    """

    def made_of(self, clips: torch.Tensor, indices: range) -> torch.Tensor:
        return torch.stack([self.condition(clips, places) for places in KNOWN.values()], dim=1).half()

    def condition(self, clips: torch.Tensor, places: tuple[int, ...]) -> torch.Tensor:
        """The 17 channels `(n, latent frames, 17, size / 8, size / 8)` where the frames at `places` are known."""
        unknown = torch.ones(1, 1, *clips.shape[2:])
        unknown[:, :, list(places)] = 0
        latents = self.encode(torch.where(unknown > 0.5, BLACK, clips))
        frames, height, width = latents.shape[1], *latents.shape[3:]
        mask = mask_latents(unknown, frames, height, width).transpose(1, 2) * self.scale
        return torch.cat([mask.expand(len(latents), -1, -1, -1, -1), latents], dim=2)

    def draw(self, chosen: list[int], rng: random.Random) -> torch.Tensor:
        """Of clips by their indices, the channels of one case each; all zero where nothing is known."""
        assert self.latents is not None
        found = [self.latents[index, rng.randrange(len(KNOWN))].float() for index in chosen]
        return torch.stack([torch.zeros_like(one) if rng.random() < 0.25 else one for one in found])
