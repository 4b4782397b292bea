"""The CogVideoX autoencoder, adopted from diffusers' model and run layer by layer on channels-last frames."""

from __future__ import annotations

import copy
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.hooks import add_hook_to_module
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXDecoder3D,
    CogVideoXDownBlock3D,
    CogVideoXEncoder3D,
    CogVideoXMidBlock3D,
    CogVideoXResnetBlock3D,
    CogVideoXSafeConv3d,
    CogVideoXSpatialNorm3D,
    CogVideoXUpBlock3D,
)
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.downsampling import CogVideoXDownsample3D
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.upsampling import CogVideoXUpsample3D
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..family import PIXELS_PER_LATENT
from ..hooks import (
    StandsFor,
    aligns_devices,
    has_global_hooks,
    hooks_of_diffusers,
    is_hooked,
    moves_weights,
    unwrapped,
)
from ..parallel.bands import Band
from ..plan import UNLIMITED, VaePlan
from .checks import check_finite, check_input, check_place
from .choice import default_plan, why_not_adopted
from .chunks import ChunkState, SlicingPlan, Spans, run_chunks
from .network import decode_chunk, encode_chunk
from .slicing import plan_decode, plan_encode

if TYPE_CHECKING:
    from torch._dynamo import OptimizedModule

# What our layers compute, and no subclass of it: anything else may compute something else.
LAYERS = frozenset(
    {
        *(CogVideoXEncoder3D, CogVideoXDecoder3D, CogVideoXDownBlock3D, CogVideoXMidBlock3D, CogVideoXUpBlock3D),
        *(CogVideoXResnetBlock3D, CogVideoXCausalConv3d, CogVideoXSafeConv3d, CogVideoXSpatialNorm3D),
        *(CogVideoXDownsample3D, CogVideoXUpsample3D, nn.Conv2d, nn.GroupNorm, nn.SiLU, nn.Dropout, nn.ModuleList),
    }
)
# Slicing plans of so many sizes are kept of an autoencoder: to plan takes milliseconds, which a small clip's encoding
# would notice.
KEPT_PLANS = 16
_kept_plans: weakref.WeakKeyDictionary[nn.Module, dict[tuple, SlicingPlan]] = weakref.WeakKeyDictionary()
_kept_plans_lock = threading.Lock()


def plan_of(vae: FastAutoencoderKLCogVideoX, frames: torch.Tensor | None = None) -> VaePlan:
    """The plan by which `vae` runs: of the generation that it runs in, or where it is called by itself the default.

    Args:
        frames: what it is called with; None: something of its own dtype, where its weights are.
    """
    from .. import session  # here, as it imports what a plan is made of

    device, dtype = (vae.device, vae.dtype) if frames is None else (frames.device, frames.dtype)
    generation = session.current(vae)
    if generation is None:
        return default_plan(device, dtype, vae.memory_budget)
    plan: VaePlan = generation.plan.vae
    if not plan.ours or (plan.device.type, plan.dtype) == (device.type, dtype):
        return plan
    return default_plan(device, dtype, plan.budget)  # it was moved since


class FastAutoencoderKLCogVideoX(AutoencoderKLCogVideoX, metaclass=StandsFor):
    """diffusers' model with our layers; adopted from one by `adopt`, or made and loaded as that is.

    It has the configuration, the modules and the state dict of diffusers' class, and saves as that class. diffusers'
    own code runs, on the same modules, where its numbers or its hooks are asked for: with tiling, with slicing of a
    batch, when gradients are needed, under autocast, when it is compiled, and with modules that were replaced or have
    hooks. `force_upcast` means what it means in diffusers' class: nothing is upcast, whoever calls sees to it.

    Attributes:
        memory_budget: bytes that the layers' tensors may take where no generation's plan says so, see
            `chunks.SlicingPlan`; `UNLIMITED` or None: what costs no time.
    """

    _stands_for = AutoencoderKLCogVideoX
    memory_budget: int | None = UNLIMITED

    @classmethod
    def adopt(cls, reference: nn.Module) -> Any:
        """A fast model that shares every weight and hook with `reference`, which goes on working.

        Slicing and tiling are as they were there. What `torch.compile` wraps is adopted and wrapped again.

        Raises:
            ValueError: for a model that would lose something, see `choice.why_not_adopted`.
        """
        reason = why_not_adopted(reference)
        if reason is not None:
            raise ValueError(f"this autoencoder cannot be made fast: {reason}")
        model = unwrapped(reference)
        fast = _sharing(cls, model)
        return fast if model is reference else cast("OptimizedModule", reference).dynamo_ctx(fast)

    def as_reference(self) -> AutoencoderKLCogVideoX:
        """diffusers' own model of the same modules, as `adopt` took them."""
        return _sharing(AutoencoderKLCogVideoX, self)

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        config["_class_name"] = AutoencoderKLCogVideoX.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @apply_forward_hook
    def decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Pixels of latents.

        Args:
            z: `(batch, latent_channels, time, height, width)` of the model's dtype and on its device, any size.

        Returns:
            `(batch, out_channels, frames, 8 * height, 8 * width)`, as `.sample` or in a tuple.

        Raises:
            TypeError, ValueError: for latents that do not fit, and for NaN or infinite ones, see `check_input`; for
                a memory budget that is too small.
        """
        plan = self._plan_of_latents(z)
        if plan is None:
            return super().decode(z, return_dict=return_dict)
        frames = torch.cat(list(self._decoded(z, plan)), dim=2)
        return DecoderOutput(sample=frames) if return_dict else (frames,)

    @apply_forward_hook
    def decode_stream(self, z: torch.Tensor) -> Iterator[torch.Tensor]:
        """The same pixels as `decode`, chunk by chunk as they are ready; without gradients.

        Chunks are diffusers' own: of two latent frames each, the first with the remainder. With tiling or slicing,
        which do not go by time, all frames come at once.

        Args, raises: as `decode`; latents are checked at the call, not at the first chunk.
        """
        with torch.no_grad():
            plan = self._plan_of_latents(z)
            if plan is None:
                return iter([super().decode(z).sample])
        return self._decoded(z, plan, keeps_output=False)

    def plan_decode(
        self, shape: tuple[int, ...], keeps_output: bool = True, plan: VaePlan | None = None
    ) -> SlicingPlan:
        """What decoding latents of `shape` takes and how it is sliced.

        Args:
            shape: `(batch, latent_channels, time, height, width)`.
            keeps_output: False for `decode_stream`.
            plan: None for that of `plan_of`.

        Raises:
            BudgetError: if the budget is too small.
        """
        spans = Spans(shape[2], self.num_latent_frames_batch_size)
        return self._kept(plan_decode, self.decoder, shape, spans, plan, keeps_output)

    def plan_encode(self, shape: tuple[int, ...], plan: VaePlan | None = None) -> SlicingPlan:
        """What encoding pixels of `shape` `(batch, in_channels, frames, height, width)` takes and how it is sliced."""
        spans = Spans(shape[2], self.num_sample_frames_batch_size)
        return self._kept(plan_encode, self.encoder, shape, spans, plan)

    def _kept(
        self,
        make: Callable[..., SlicingPlan],
        network: nn.Module,
        shape: tuple[int, ...],
        spans: Spans,
        plan: VaePlan | None,
        *rest: bool,
    ) -> SlicingPlan:
        """What `make` makes of these, made once: it depends on sizes alone, and names the layers of `network`."""
        plan = plan or plan_of(self)
        key = (make, tuple(network.modules()), tuple(shape), spans, plan, *rest)
        with _kept_plans_lock:
            slicing = _kept_plans.setdefault(self, {}).get(key)
        if slicing is None:
            slicing = make(self, shape, spans, plan, *rest)
            with _kept_plans_lock:
                kept = _kept_plans.setdefault(self, {})
                if len(kept) >= KEPT_PLANS:
                    kept.pop(next(iter(kept)))
                kept[key] = slicing
        return slicing

    @apply_forward_hook
    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The posterior of pixels, whose `mode()` and `sample(generator)` are latents.

        Args:
            x: `(batch, in_channels, frames, height, width)` of the model's dtype and on its device, at least 8 x 8.

        Returns:
            The posterior over `(batch, latent_channels, time, height / 8, width / 8)`, as `.latent_dist` or in a tuple.

        Raises:
            TypeError, ValueError: as `decode`.
        """
        plan = self._plan_of_pixels(x)
        if plan is None:
            return super().encode(x, return_dict=return_dict)
        posterior = DiagonalGaussianDistribution(torch.cat(list(self._encoded(x, plan)), dim=2))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _plan_of_latents(self, z: torch.Tensor) -> VaePlan | None:
        tile = self.tile_latent_min_height, self.tile_latent_min_width
        return self._checked_plan("latents", z, self.config.latent_channels, 1, tile)

    def _plan_of_pixels(self, x: torch.Tensor) -> VaePlan | None:
        tile = self.tile_sample_min_height, self.tile_sample_min_width
        smallest = 2 ** sum(block.downsamplers is not None for block in self.encoder.down_blocks)
        return self._checked_plan("pixels", x, self.config.in_channels, smallest, tile)

    def _checked_plan(
        self, name: str, x: torch.Tensor, channels: int, smallest: int, tile: tuple[int, int]
    ) -> VaePlan | None:
        """How our layers run on `x`, or None where diffusers' own code does. Raises for frames that do not fit."""
        if torch.compiler.is_compiling():
            return None
        check_input(name, x, channels, smallest)
        if "group_offloading" in hooks_of_diffusers(self):
            raise ValueError(
                "the autoencoder's weights are offloaded by groups that are brought for forward() alone, which neither"
                " decode() nor encode() is: use enable_group_offload(offload_type='leaf_level'), or"
                " pipe.enable_model_cpu_offload()"
            )
        casts = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
        called = next((part for part, module in self.named_modules() if part and _is_called(module, x.device)), "")
        if not (casts or called):  # else weights may be where they are, in their dtype, only for a module's call
            check_place(name, x, self.dtype, self.device)
        check_finite(name, x)
        sliced = self.use_slicing and x.shape[0] > 1
        tiled = self.use_tiling and (x.shape[3] > tile[0] or x.shape[4] > tile[1])
        reasons = {
            "hooks of all modules are registered with torch": has_global_hooks(),
            "torch.autocast is on": casts,
            f"{called} is hooked, compiled or replaced": bool(called),
            "slicing is on": sliced,
            "tiling is on": tiled,
            "gradients are asked for": self._needs_grad(x),
        }
        reason = next((reason for reason, holds in reasons.items() if holds), "")
        plan = plan_of(self, x)
        _tell(self, reason or plan.why)
        return plan if plan.ours and not reason else None

    def _needs_grad(self, x: torch.Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def _decoded(self, z: torch.Tensor, plan: VaePlan, keeps_output: bool = True) -> Iterator[torch.Tensor]:
        def decode(chunk: torch.Tensor, state: ChunkState) -> torch.Tensor:
            if self.post_quant_conv is not None:
                chunk = self.post_quant_conv(chunk)
            if band is None:
                return decode_chunk(self.decoder, chunk, state)
            return band.gathered(decode_chunk(self.decoder, band.own(chunk, 3), state), 3)

        band = _band_of(self, z.shape[3])
        shape = tuple(z.shape if band is None else band.own(z, 3).shape)
        state = ChunkState(plan, self.plan_decode(shape, keeps_output, plan), band)
        return run_chunks(z, self.num_latent_frames_batch_size, state, decode)

    def _encoded(self, x: torch.Tensor, plan: VaePlan) -> Iterator[torch.Tensor]:
        def encode(chunk: torch.Tensor, state: ChunkState) -> torch.Tensor:
            chunk = chunk if band is None else band.own(chunk, 3)
            moments = encode_chunk(self.encoder, chunk, state).permute(0, 4, 1, 2, 3).contiguous()
            moments = moments if band is None else band.gathered(moments, 3)
            return moments if self.quant_conv is None else self.quant_conv(moments)

        band = _band_of(self, *divmod(x.shape[3], PIXELS_PER_LATENT))
        shape = tuple(x.shape if band is None else band.own(x, 3).shape)
        state = ChunkState(plan, self.plan_encode(shape, plan), band)
        return run_chunks(x, self.num_sample_frames_batch_size, state, encode)


def _band_of(vae: FastAutoencoderKLCogVideoX, units: int, rest: int = 0) -> Band | None:
    """The rows of frames that are this process's in the generation that `vae` runs in; None: all.

    Args:
        units: rows of the latents.
        rest: rows of pixels beyond them, which no band could have.
    """
    from .. import session

    generation = session.current(vae)
    ranks = None if generation is None else generation.ranks
    if generation is None or ranks is None or ranks.config.vae == 1:
        return None
    band = None if rest else Band.of(ranks.everyone, units)
    if band is None:
        generation.ran.why_whole["frames"] = (
            f"{units} rows of latents" + (f" and {rest} of pixels" if rest else "") + " are no bands for all processes"
        )
    return band


def _is_called(module: nn.Module, device: torch.device) -> bool:
    """Whether calling a module is, or may be, more than what our layers do with its weights on `device`."""
    if type(module) not in LAYERS:
        return True
    if not aligns_devices(module, device):
        return is_hooked(module) or moves_weights(module)
    own = getattr(module._old_forward, "__func__", None) is type(module).forward
    return not own or bool(module._forward_hooks) or bool(module._forward_pre_hooks)


def _tell(vae: FastAutoencoderKLCogVideoX, why: str) -> None:
    """The running generation is told why diffusers' own code runs; "": it does not."""
    from .. import session

    generation = session.current(vae)
    if generation is not None:
        generation.ran.vae_entered, generation.ran.vae_why_diffusers = True, why


def _sharing(cls: type[nn.Module], source: AutoencoderKLCogVideoX) -> Any:
    """A `cls` with the configuration, the settings, the hooks and the very modules of `source`."""
    model: Any = cls.__new__(cls)
    nn.Module.__init__(model)
    own = set(model.__dict__)
    hook = getattr(source, "_hf_hook", None)
    # These are bound to `source`: what accelerate hangs on it is hung on the model anew.
    bound = ("_diffusers_hook",) if hook is None else ("_hf_hook", "_old_forward", "forward", "to", "cuda")
    for name, value in source.__dict__.items():
        if name not in bound and (name not in own or "_hook" in name):
            model.__dict__[name] = value
    for name, child in source.named_children():
        model.add_module(name, child)
    model.train(source.training)
    return model if hook is None else add_hook_to_module(model, copy.copy(hook))
