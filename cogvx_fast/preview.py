"""Pictures of latents without the autoencoder: while a clip is denoised, what it is going to be.

Two parts. An affine map takes a latent pixel to the mean colour of the pixels that it stands for: 17 x 3 numbers, found
by least squares on what the autoencoder itself decodes. And the clean latents that a step predicts follow from what the
transformer took and gave: of the session there are two references, no copies.
"""

from __future__ import annotations

import contextvars
import copy
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from torch import nn
from torch.nn import functional

from . import devices
from .callbacks import CALLBACK, with_callback
from .config import shown
from .family import FRAMES_PER_LATENT, PIXELS_PER_LATENT, latent_frames
from .hooks import unwrapped
from .session import EngineSession
from .state import fingerprint
from .transformer import FastCogVideoXTransformer3DModel
from .vae.checks import check_layout

KEYWORD = "preview"  # of a pipeline's call, and what the callback finds the picture under
# What `help()` says of it behind the parent's own, as indented as that.
DOCUMENTATION = """
            preview (`bool`, *optional*, defaults to `False`):
                cogvx_fast's own, by name only: `callback_on_step_end` finds in its `callback_kwargs` under "preview" a
                picture of the clip that the step predicts, uint8 `(batch, latent frames, height / 8, width / 8, 3)` on
                the device. The first time a map to colours is fitted on the autoencoder, which takes about a second.
        """

# What the map is fitted on: clips of three latent frames, 64 x 64 pixels, of a random colour every 8 pixels and smooth
# in between. The gain saturates some: flat areas of full colours are frequent in real clips, too.
_FITTED, _HELD_OUT = 6, 2  # clips that are fitted, and that the error is found on
_SIDE, _FRAMES = 8 * PIXELS_PER_LATENT, 2 * FRAMES_PER_LATENT + 1
_GAIN = 2.0, 6.0

# By autoencoder: what its weights were, and the map.
_MAPS: weakref.WeakKeyDictionary[nn.Module, tuple[Any, LatentPreview]] = weakref.WeakKeyDictionary()
_MAPS_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class LatentPreview:
    """An affine map from latents, as pipelines hold them, to colours.

    Pipelines hold what the autoencoder encodes times its `scaling_factor`, all of them: `invert_scale_latents` of
    CogVideoX 1.5 is about the picture beside the latents of image-to-video.

    Attributes:
        weight: fp32 `(latent_channels, 3)`.
        bias: fp32 `(3,)`; colours are -1 to 1.
        decibels: PSNR of its colours against the decoder's mean ones, of clips that it was not fitted on.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    decibels: float

    @classmethod
    @torch.no_grad()
    def fit(cls, vae: Any, device: torch.device | str | None = None) -> LatentPreview:
        """The map of an autoencoder, which stays as it is: settings, weights and torch's random state, too.

        It takes as long as 72 frames of 64 x 64 pixels take to be encoded and decoded, 2% of CogVideoX-2b's own clip:
        about a second for the demo checkpoint on a CPU in bf16 or fp32, and many times that in fp16, which it has no
        fast convolutions for.

        Args:
            vae: diffusers' `AutoencoderKLCogVideoX` or ours, of any dtype.
            device: where it runs; None: where its weights are.

        Raises:
            ValueError: if what it decodes is not finite.
        """
        device = torch.device(vae.device if device is None else device)
        vae = copy.copy(vae)  # of the same modules
        vae.use_tiling = vae.use_slicing = False  # what is this small is done in one piece
        generator = torch.Generator("cpu").manual_seed(0)
        latents, colours = [], []
        for _ in range(_FITTED + _HELD_OUT):
            clip = _clip(generator).to(device, vae.dtype)
            encoded = vae.encode(clip).latent_dist.mode()
            decoded = _means(vae.decode(encoded).sample.float(), encoded.shape)
            # fp64 on the CPU: not every device has it, and it is a thousand rows.
            latents.append(encoded.movedim(1, -1).flatten(0, -2).cpu().double())
            colours.append(decoded.movedim(1, -1).flatten(0, -2).cpu().double())
        x, y = torch.stack(latents), torch.stack(colours)
        if not (x.isfinite().all() and y.isfinite().all()):
            raise ValueError(
                f"{KEYWORD}: the autoencoder, in {vae.dtype}, gives numbers that are not finite, so that no map to"
                " colours can be fitted"
            )
        x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2)
        # The driver that needs no full rank: an autoencoder may leave channels unused.
        found = torch.linalg.lstsq(x[:_FITTED].flatten(0, 1), y[:_FITTED].flatten(0, 1), driver="gelsd").solution
        error = (x[_FITTED:] @ found - y[_FITTED:]).square().mean()
        weight, bias = found[:-1] / vae.config.scaling_factor, found[-1]
        decibels = float(10 * torch.log10(2**2 / error))  # of -1 to 1
        return cls(weight.float().to(device), bias.float().to(device), decibels)

    @torch.no_grad()
    def frames(self, latents: torch.Tensor) -> torch.Tensor:
        """A picture for each latent frame; what is not finite is black.

        Args:
            latents: clean ones, `(batch, frames, channels, height / 8, width / 8)`, of any floating dtype.

        Returns:
            uint8 `(batch, frames, height / 8, width / 8, 3)` on the device of `latents`.

        Raises:
            TypeError, ValueError: for another layout.
        """
        check_layout("latents", latents, self.weight.shape[0], axis=2)
        weight, bias = self.weight.to(latents.device), self.bias.to(latents.device)
        colours = torch.addmm(bias, latents.float().movedim(2, -1).flatten(0, -2), weight)
        pixels = colours.add_(1).mul_(127.5).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).round_().clamp_(0, 255)
        batch, frames, _, height, width = latents.shape
        return pixels.to(torch.uint8).view(batch, frames, height, width, 3)


def _clip(generator: torch.Generator) -> torch.Tensor:
    """A smooth colourful clip `(1, 3, frames, height, width)` in -1 to 1."""
    knots = _SIDE // PIXELS_PER_LATENT + 1
    numbers = torch.rand(1, 3, 3, knots, knots, generator=generator, dtype=torch.float32, device="cpu")
    gain = torch.rand(1, generator=generator, dtype=torch.float32, device="cpu")
    smooth = functional.interpolate(2 * numbers - 1, size=(_FRAMES, _SIDE, _SIDE), mode="trilinear", align_corners=True)
    return (smooth * (_GAIN[0] + (_GAIN[1] - _GAIN[0]) * gain)).clamp(-1, 1)


def _means(pixels: torch.Tensor, latents: torch.Size) -> torch.Tensor:
    """The mean of the pixels that each latent pixel stands for.

    Args:
        pixels: `(batch, 3, frames, height, width)`, of an odd number of latent frames: the first is one frame.
        latents: the shape that they were decoded from.
    """
    side = pixels.shape[-1] // latents[-1]
    pixels = functional.avg_pool3d(pixels, (1, side, side))
    first, rest = pixels[:, :, :1], pixels[:, :, 1:]
    return torch.cat([first, rest.unflatten(2, (latents[2] - 1, -1)).mean(3)], dim=2)


def fitted(pipeline: Any) -> LatentPreview:
    """The map of a pipeline's autoencoder: fitted at first, and when weights were changed since.

    Weights that lie elsewhere until the autoencoder is called are there again afterwards; of those that `accelerate`
    brings one by one a change is not seen.

    Raises:
        ValueError: as `LatentPreview.fit`.
    """
    vae = unwrapped(pipeline.vae)
    mark = fingerprint(vae)
    with _MAPS_LOCK:
        known = _MAPS.get(vae)
    if known is None or known[0] != mark:
        device = pipeline._execution_device
        with devices.current(device):
            # In a context of its own: it is no part of the generation that may run, whose report says what ran.
            known = mark, contextvars.Context().run(LatentPreview.fit, vae, device)
        hook = vars(vae).get("_hf_hook")
        if isinstance(hook, CpuOffload):  # else it would lie beside the transformer until that has done all steps
            hook.init_hook(vae)
        with _MAPS_LOCK:
            _MAPS[vae] = known
    return known[1]


class StepPreviews:
    """The callback of a call with `preview=True`: it adds the picture and calls the user's.

    The transformer's input and output of a step are kept from its end to the callback, by reference.
    """

    def __init__(self, pipeline: Any, call: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        """
        Args:
            call: the parent's `__call__`.
            arguments: of this call, by name.

        Raises:
            ValueError: without a callback, or an autoencoder.
        """
        self._callback: Any = arguments.get(CALLBACK)
        if self._callback is None:
            raise ValueError(f"{KEYWORD}=True needs {CALLBACK}, which gets the pictures in its callback_kwargs")
        if pipeline.vae is None:
            raise ValueError(
                f"{KEYWORD}=True needs an autoencoder, on which colours are fitted: this one's vae is None"
            )
        self._pipeline, self._call = pipeline, call
        self._num_frames = arguments.get("num_frames", _default(call, "num_frames"))
        self._guided: bool | None = None
        self._step: tuple[torch.Tensor, torch.Tensor] | None = None
        self._alphas: torch.Tensor | None = None

    def start(self, session: EngineSession, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Listen to the steps of `session`.

        Returns:
            The arguments of the parent's call, with this in the place of the user's callback.

        Raises:
            ValueError: for a pipeline whose steps are not seen, or not understood, and as `fitted`.
        """
        _check(self._pipeline)
        self._map = fitted(self._pipeline)
        session.on_step = self._seen
        return with_callback(self._call, args, kwargs, self._callback, self)

    def _seen(self, hidden_states: torch.Tensor, prediction: torch.Tensor) -> None:
        """Called after each forward pass of the transformer, with its input and its output."""
        if self._guided is None:  # dynamic guidance changes the weight, not whether there are halves
            self._guided = self._pipeline.guidance_scale > 1
        self._step = hidden_states, prediction

    def __call__(self, pipeline: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> Any:
        if self._step is None:
            raise ValueError(f"{KEYWORD}=True: the pipeline did not call its transformer in step {step}, or not ours")
        with torch.no_grad():
            clean = self._clean(*self._step, timestep)
        self._step = None
        callback_kwargs[KEYWORD] = self._map.frames(clean[:, self._padding() :])
        return self._callback(pipeline, step, timestep, callback_kwargs)

    def _clean(self, hidden_states: torch.Tensor, prediction: torch.Tensor, timestep: Any) -> torch.Tensor:
        """The latents x0 that a step predicts, fp32 `(batch, frames, channels, height, width)`.

        Formulas (4), (12) of DDIM (arXiv:2010.02502); v from arXiv:2202.00512, appendix D.
        """
        # What image-to-video and control add are channels behind.
        noisy = hidden_states[:, :, : self._map.weight.shape[0]].float()
        prediction = prediction.to(noisy.device).float()
        if self._guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + self._pipeline.guidance_scale * (conditional - unconditional)
            noisy = noisy.chunk(2)[0]
        scheduler = self._pipeline.scheduler
        if self._alphas is None:
            self._alphas = scheduler.alphas_cumprod.to(noisy.device, torch.float32)
        # By a tensor: a number would be fetched from the device.
        index = torch.as_tensor(timestep, dtype=torch.int64, device=noisy.device).reshape(1)
        alpha = self._alphas.index_select(0, index)
        kind = scheduler.config.prediction_type
        if kind == "sample":
            return prediction
        if kind == "epsilon":
            return (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
        return alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction

    def _padding(self) -> int:
        """Latent frames in front that CogVideoX 1.5 fills its tokens up with, and drops before it decodes."""
        config = unwrapped(self._pipeline.transformer).config
        if config.patch_size_t is None or self._num_frames is _ABSENT:
            return 0
        return -latent_frames(self._num_frames or config.sample_frames) % config.patch_size_t


_ABSENT = inspect.Parameter.empty
_KINDS = ("epsilon", "sample", "v_prediction")


def _default(call: Callable[..., Any], name: str) -> Any:
    parameter = inspect.signature(call).parameters.get(name)
    return _ABSENT if parameter is None else parameter.default


def _check(pipeline: Any) -> None:
    """Raise a ValueError for a pipeline whose steps predict nothing that we would see, or understand."""
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    if not isinstance(transformer, FastCogVideoXTransformer3DModel):
        hint = "; EngineConfig(compile=...) compiles ours" if unwrapped(transformer) is not transformer else ""
        raise ValueError(f"{KEYWORD}=True does not see the steps of a {type(transformer).__name__}, only ours{hint}")
    kind = getattr(scheduler.config, "prediction_type", None)
    if not hasattr(scheduler, "alphas_cumprod") or kind not in _KINDS:
        raise ValueError(
            f"{KEYWORD}=True: {type(scheduler).__name__} with prediction_type={shown(kind)} is not understood; must"
            f" have alphas_cumprod and one of {', '.join(_KINDS)}"
        )


def is_wanted(call: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for pictures; the keyword is taken out of `kwargs`, unless the parent has one of that name.

    Raises:
        TypeError: for anything but True and False.
    """
    if KEYWORD in inspect.signature(call).parameters:
        return False
    wanted = kwargs.pop(KEYWORD, False)
    if not isinstance(wanted, bool):
        raise TypeError(f"{KEYWORD}={shown(wanted)} must be True or False")
    return wanted


def signature(call: Callable[..., Any]) -> inspect.Signature:
    """The signature of a parent's `__call__` with the keyword `preview`."""
    found = inspect.signature(call)
    if KEYWORD in found.parameters:
        return found
    own = inspect.Parameter(KEYWORD, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    parameters = list(found.parameters.values())
    place = len(parameters) - bool(parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return found.replace(parameters=[*parameters[:place], own, *parameters[place:]])
