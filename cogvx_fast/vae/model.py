"""The CogVideoX autoencoder, adopted from diffusers' model and run layer by layer on channels-last frames."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..hooks import is_hooked, moves_weights
from .decoder import decode_chunk
from .encoder import encode_chunk
from .layers import Clip
from .memory import MemoryPlan, plan_decode, plan_encode
from .place import Place
from .validate import check_input

# Plans of so many sizes are kept: to plan takes milliseconds, which a small clip's encoding would notice.
KEPT_PLANS = 16


class FastAutoencoderKLCogVideoX(AutoencoderKLCogVideoX):
    """diffusers' model with our forward pass; made by `adopt`, never from scratch.

    It has the configuration, the modules and the state dict of the model it was adopted from, and saves
    as that class. diffusers' own code runs, on the same modules, where its numbers or its hooks are asked for: with
    tiling, with slicing of a batch, when gradients are needed, and under hooks that bring weights for a module's
    call. `force_upcast` means what it means in diffusers' class: nothing is upcast, whoever calls sees to it.

    Attributes:
        memory_budget: bytes that the layers' tensors may take, see `memory.MemoryPlan`; None: what costs no time.
        place: what computes; None: the best where the weights are.
    """

    memory_budget: int | None = None
    place: Place | None = None

    @classmethod
    def adopt(cls, reference: AutoencoderKLCogVideoX) -> FastAutoencoderKLCogVideoX:
        """A fast model that shares every weight with `reference`, which goes on working.

        Slicing and tiling are as they were there.

        Raises:
            ValueError: for an activation other than SiLU, and if offloading hooks hang on `reference`: they belong
                to its own calls.
        """
        reason = why_not_adopted(reference)
        if reason is not None:
            raise ValueError(f"this autoencoder cannot be made fast: {reason}")
        model = _sharing(cls, reference)
        model._plans = {}
        return model

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
            TypeError, ValueError: for latents that do not fit, and for NaN or infinite ones, see `validate`; for a
                memory budget that is too small.
        """
        hooked = self._check("latents", z, self.config.latent_channels)
        if hooked or self._is_left_to_reference(z, self.tile_latent_min_height, self.tile_latent_min_width):
            return super().decode(z, return_dict=return_dict)
        frames = torch.cat(list(self._decoded(z)), dim=2)
        return DecoderOutput(sample=frames) if return_dict else (frames,)

    @apply_forward_hook
    def decode_stream(self, z: torch.Tensor) -> Iterator[torch.Tensor]:
        """The same pixels as `decode`, chunk by chunk as they are ready; without gradients.

        Chunks are diffusers' own: of two latent frames each, the first with the remainder. With tiling or slicing,
        which do not go by time, all frames come at once.

        Args, raises: as `decode`; latents are checked at the call, not at the first chunk.
        """
        hooked = self._check("latents", z, self.config.latent_channels)
        z = z.detach()
        tile = self.tile_latent_min_height, self.tile_latent_min_width
        if hooked or self._is_left_to_reference(z, *tile, ignore_grad=True):
            with torch.no_grad():
                return iter([super().decode(z).sample])
        return self._decoded(z, keeps_output=False)

    def plan_decode(self, shape: tuple[int, ...], keeps_output: bool = True, place: Place | None = None) -> MemoryPlan:
        """What decoding latents of `shape` takes and how it is done.

        Args:
            shape: `(batch, latent_channels, time, height, width)`.
            keeps_output: False for `decode_stream`.
            place: None for where the weights are now.

        Raises:
            ValueError: if the memory budget is too small.
        """
        spans = chunk_spans(shape[2], self.num_latent_frames_batch_size)
        return self._kept(plan_decode, shape, spans, place, keeps_output)

    def plan_encode(self, shape: tuple[int, ...], place: Place | None = None) -> MemoryPlan:
        """The same for encoding pixels of `shape`, `(batch, in_channels, frames, height, width)`."""
        spans = chunk_spans(shape[2], self.num_sample_frames_batch_size)
        return self._kept(plan_encode, shape, spans, place)

    def _kept(
        self,
        plan: Callable[..., MemoryPlan],
        shape: tuple[int, ...],
        spans: list[tuple[int, int]],
        place: Place | None,
        *rest: bool,
    ) -> MemoryPlan:
        """`plan` of these, made once: a plan is of sizes alone, and names layers."""
        place = place or self._own_place
        key = (plan, tuple(shape), tuple(spans), place, self.memory_budget, *rest)
        if key not in self._plans:
            if len(self._plans) >= KEPT_PLANS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = plan(self, shape, spans, place, self.memory_budget, *rest)
        return self._plans[key]

    @property
    def _own_place(self) -> Place:
        return self.place or Place.of(self.device, self.dtype)

    def _place_of(self, frames: torch.Tensor) -> Place:
        return self.place or Place.of(frames.device, frames.dtype)

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
        hooked = self._check("pixels", x, self.config.in_channels, smallest=2**self._num_downsamplers)
        if hooked or self._is_left_to_reference(x, self.tile_sample_min_height, self.tile_sample_min_width):
            return super().encode(x, return_dict=return_dict)
        posterior = DiagonalGaussianDistribution(torch.cat(list(self._encoded(x)), dim=2))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _check(self, name: str, x: torch.Tensor, channels: int, smallest: int = 1) -> bool:
        """Raises for frames that do not fit. Returns whether to call the modules is more than what our layers do with
        their weights."""
        hooked = any(is_hooked(module) or moves_weights(module) for module in self.modules() if module is not self)
        # Under hooks, weights are where they are only for a module's call.
        dtype, device = (None, None) if hooked else (self.dtype, self.device)
        check_input(name, x, channels, smallest, dtype, device)
        return hooked

    @property
    def _num_downsamplers(self) -> int:
        return sum(block.downsamplers is not None for block in self.encoder.down_blocks)

    def _is_left_to_reference(
        self, x: torch.Tensor, tile_height: int, tile_width: int, ignore_grad: bool = False
    ) -> bool:
        sliced = self.use_slicing and x.shape[0] > 1
        tiled = self.use_tiling and (x.shape[4] > tile_width or x.shape[3] > tile_height)
        return sliced or tiled or (not ignore_grad and self._needs_grad(x))

    def _needs_grad(self, x: torch.Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def _decoded(self, z: torch.Tensor, keeps_output: bool = True) -> Iterator[torch.Tensor]:
        def decode(chunk: torch.Tensor, clip: Clip) -> torch.Tensor:
            if self.post_quant_conv is not None:
                chunk = self.post_quant_conv(chunk)
            return decode_chunk(self.decoder, chunk, clip)

        place = self._place_of(z)
        plan = self.plan_decode(tuple(z.shape), keeps_output, place)
        return _chunks(z, self.num_latent_frames_batch_size, plan, place, decode)

    def _encoded(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        def encode(chunk: torch.Tensor, clip: Clip) -> torch.Tensor:
            moments = encode_chunk(self.encoder, chunk, clip).permute(0, 4, 1, 2, 3).contiguous()
            return moments if self.quant_conv is None else self.quant_conv(moments)

        place = self._place_of(x)
        plan = self.plan_encode(tuple(x.shape), place)
        return _chunks(x, self.num_sample_frames_batch_size, plan, place, encode)


def _sharing(cls: type[AutoencoderKLCogVideoX], source: AutoencoderKLCogVideoX) -> AutoencoderKLCogVideoX:
    """A `cls` with the configuration, the settings and the very modules of `source`."""
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    own = set(model.__dict__)
    model.__dict__.update({name: value for name, value in source.__dict__.items() if name not in own})
    for name, child in source.named_children():
        model.add_module(name, child)
    model.train(source.training)
    return model


def why_not_adopted(reference: nn.Module) -> str | None:
    """What keeps an autoencoder from being adopted, or None."""
    if not isinstance(reference, AutoencoderKLCogVideoX):
        return f"it is a {type(reference).__name__}, not an {AutoencoderKLCogVideoX.__name__}"
    if reference.config.act_fn not in ("silu", "swish"):
        return f"its activation is {reference.config.act_fn!r}, our layers have SiLU in them"
    if hasattr(reference, "_hf_hook"):
        return (
            "it has offloading hooks already; make the pipeline fast first and then call enable_model_cpu_offload(),"
            " enable_sequential_cpu_offload() or set a device map"
        )
    return None


def chunk_spans(length: int, size: int) -> list[tuple[int, int]]:
    """First and last (exclusive) frames of each chunk as diffusers has them: the first takes the remainder.

    GroupNorm's statistics are those of a chunk: other chunks would be another video.
    """
    remainder = length % size
    number = max(length // size, 1)
    return [(size * i + (remainder if i else 0), min(size * (i + 1) + remainder, length)) for i in range(number)]


def _chunks(
    frames: torch.Tensor, size: int, plan: MemoryPlan, place: Place, run: Callable[[torch.Tensor, Clip], torch.Tensor]
) -> Iterator[torch.Tensor]:
    """`run` of each chunk in turn, without gradients."""
    clip = Clip(place.impl, place.product, plan.rows, plan.frames_at_once, plan.elsewhere, plan.plain)
    for first, last in chunk_spans(frames.shape[2], size):
        clip.is_last = last == frames.shape[2]
        # Not around the yield: whoever takes the chunks has a mode of their own.
        with torch.no_grad():
            chunk = run(frames[:, :, first:last], clip)
        yield chunk
        del chunk
