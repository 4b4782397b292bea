"""What the denoiser is asked, and what its errors count: the timesteps of a batch, its targets, guidance, weights."""

from __future__ import annotations

import torch

# What the prompt decides, shape and way, is decided in the noisiest quarter: below it, the latents show it.
NOISY = 750  # the quarter's first timestep of 1,000
LAST = 15  # a pipeline's last timestep of 50 is 19
CONTRAST = 0.17  # of an average clip: mean squared distance of its latents from those of its ground


def draw_timesteps(
    generator: torch.Generator, num_train_timesteps: int, count: int, noisy_share: float, evenness: float = 1.0
) -> torch.Tensor:
    """`count` timesteps, `noisy_share` of them evenly spread over the noisiest quarter, the others over the rest.

    These are even with an `evenness` of 1, and as that power of even numbers otherwise.
    """
    noisy = int(count * noisy_share)
    offset = torch.rand((), generator=generator)
    below, high = ((offset + torch.arange(part) / part) % 1 for part in (count - noisy, noisy))
    return torch.cat([below**evenness * NOISY, NOISY + high * (num_train_timesteps - NOISY)]).long()


def guidance_scales(timesteps: torch.Tensor, largest: float, generator: torch.Generator) -> torch.Tensor:
    """Scales (B,) to train at: anything from 0 to `largest` where the latents show what the prompt says.

    Where they do not, 0 or 1, without the prompt or with it: there guidance has something to say, and exaggerates.
    """
    scales = torch.rand(timesteps.shape, generator=generator)
    return torch.where(timesteps < NOISY, scales * largest, scales.round())


def guide(told: torch.Tensor, untold: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The guided prediction (Ho & Salimans 2021), as the pipeline makes it: what is said without a prompt and, `scales`
    times, what the prompt changes of it."""
    return untold + scales.view(-1, 1, 1, 1, 1) * (told - untold)


def nearly_clean(timesteps: torch.Tensor, below: int) -> list[int]:
    """Which of a batch are of so little noise that what the denoiser itself has left there matters: that of less
    than timestep `below`."""
    return [k for k, timestep in enumerate(timesteps.tolist()) if LAST <= timestep < below]


def from_drawn(
    drawn: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a denoiser meets, `drawn` with `noise` at alpha_bar `alpha`, and the v that leads from there to `clean`."""
    noisy = alpha.sqrt() * drawn + (1 - alpha).sqrt() * noise
    return noisy, (alpha.sqrt() * noisy - clean) / (1 - alpha).sqrt()


def object_weights(latents: torch.Tensor) -> torch.Tensor:
    """Weights (B, frames, 1, h, w) of mean 1, up to five times as large where the object is as on the background.

    Used with the factor 1 - alpha_bar, which makes the error of v that of the clean latents: what is left of the loss
    at low noise is the noise that was added to the latents, and teaches nothing.
    """
    background = latents.flatten(3).median(dim=3).values[..., None, None]
    distance = (latents - background).norm(dim=2, keepdim=True)
    weights = 1 + 4 * distance / distance.amax(dim=(3, 4), keepdim=True).clamp(min=1e-6)
    return weights / weights.mean(dim=(3, 4), keepdim=True)


def faint_weights(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Weights (B, 1, 1, 1, 1): what is as gray as its ground has an outline that matters as much as any other.

    1 in the noisiest quarter, where the mean of what is possible is learned: there, weights of clips would bend it.
    """
    background = latents.flatten(3).median(dim=3).values[..., None, None]
    contrast = (latents - background).square().mean(dim=(1, 2, 3, 4))
    weights = torch.where(timesteps < NOISY, CONTRAST / contrast.clamp(min=CONTRAST / 4), 1.0)
    return weights.view(-1, 1, 1, 1, 1)
