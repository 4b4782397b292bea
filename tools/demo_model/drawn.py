"""Training clips as the denoiser leaves them, to learn what to make of that.

A generation's latents are not quite what an encoder makes: an outline wobbles by a part of a pixel from one latent to
the next, and what a step has left there the next one takes for meant. So that what is meant is known, these are clips
that were noised so little that they still say where everything is, and denoised as the pipeline does it.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX

from .data import describe
from .dit import TEXT_LENGTH, Stage, build_scheduler, build_transformer, encode_text
from .latents import LatentCache
from .objective import guide
from .state import load_state
from .text import build_text_encoder, build_tokenizer, tie_cases
from .vae import bf16_where_fast

NUM_STEPS = 25
GUIDANCE = 6.0
CLIPS = 320


class DrawnCache(LatentCache):
    """Scaled latents of training clips, noised to one of `starts` in turn and denoised by what `stage` has learned.

    They are in `folder`, as the weights of the stage are.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX, folder: Path, stage: Stage, starts: tuple[int, ...]):
        scale = load_state(stage.latents_in(folder))["scale"]
        super().__init__(vae, folder / f"{stage.name}_drawn.pt", stage.size, scale, stage.jitter)
        self.starts = starts
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.transformer = build_transformer(stage.size)
        model = torch.nn.ModuleDict({"transformer": self.transformer, "text_encoder": self.text_encoder})
        model.load_state_dict(load_state(folder / f"{stage.name}.pt")["average"])
        tie_cases(self.text_encoder)
        self.scheduler = build_scheduler()
        self.scheduler.set_timesteps(NUM_STEPS)

    def made_of(self, clips: torch.Tensor, indices: range) -> torch.Tensor:
        clean = self.encode(clips)
        prompts = [describe(self.scene(i), random.Random(f"drawn {i}")) for i in indices]
        made = torch.empty_like(clean)
        for place, start in enumerate(self.starts):
            chosen = [k for k, i in enumerate(indices) if i % len(self.starts) == place]
            if chosen:
                made[chosen] = self.redrawn(clean[chosen], [prompts[k] for k in chosen], start, indices[chosen[0]])
        return made

    @torch.no_grad()
    def redrawn(self, clean: torch.Tensor, prompts: list[str], start: int, seed: int) -> torch.Tensor:
        """`clean` noised to timestep `start` and denoised from there with guidance, as a generation does it."""
        scheduler, count = self.scheduler, len(clean)
        steps = [step for step in scheduler.timesteps if step < start]
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        latents = scheduler.add_noise(clean, noise, steps[0][None].expand(count))
        with bf16_where_fast():
            embeds = encode_text(self.text_encoder, self.tokenizer, prompts + [""] * count, TEXT_LENGTH)
            for step in steps:
                doubled = torch.cat([latents, latents])
                output = self.transformer(doubled, embeds, step.expand(2 * count), return_dict=False)[0].float()
                velocity = guide(*output.chunk(2), torch.full((count,), GUIDANCE))
                latents = scheduler.step(velocity, step, latents, return_dict=False)[0]
        return latents
