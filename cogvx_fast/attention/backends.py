"""The attention backends as data, and the one place that chooses between them.

Calls of packages go through diffusers' attention dispatcher, which knows every package's layout and
signature; so `transformer.set_attention_backend(...)` means what it means for diffusers' other models.
Our own kernels, and torch's where one is named, are called directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements
from torch.nn.attention import SDPBackend

from ..config import AttentionBackend
from . import sdpa


@dataclass(frozen=True)
class Capability:
    """What a backend needs and takes.

    Attributes:
        dispatch: its name in diffusers' dispatcher; None for what is called directly.
        exact: whether it changes nothing but the order of rounding.
        kernel: one of torch's kernels, over query, key and value `(batch, sequence, heads, head_dim)`.
        impl: the kernel's name in `operation`, if it is our own.
        operation: which of `cogvx_kernels.ops` that is.
        devices: device types it runs on; None: all.
        dtypes: of query, key and value; None: all.
        head_dims: those it has kernels for; None: all.
        compute_capability: of the GPU, lowest and highest; None: any.
        gains_on: compute capabilities where it is known to gain time, so that `auto` may take it; None: all.
        why_unavailable: what else keeps this machine from running it, or None.
        why_not: what else keeps a device from running it for a dtype and a head dim, or None.
        install: how to get it.
    """

    dispatch: AttentionBackendName | None
    exact: bool
    kernel: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    impl: str | None = None
    operation: str = "attention"
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    head_dims: frozenset[int] | None = None
    compute_capability: tuple[tuple[int, int], tuple[int, int]] | None = None
    gains_on: frozenset[tuple[int, int]] | None = None
    why_unavailable: Callable[[], str | None] | None = None
    why_not: Callable[[torch.device, torch.dtype, int], str | None] | None = None
    install: str = "comes with torch"


_HALF = frozenset((torch.float16, torch.bfloat16))
_GPU = frozenset(("cuda",))
_FLASH_HEAD_DIMS = frozenset(range(8, 257, 8))

# Limits as the packages state them: the READMEs of flash-attention, xformers and SageAttention.
CAPABILITIES: dict[AttentionBackend, Capability] = {
    AttentionBackend.FLASH_3: Capability(
        AttentionBackendName._FLASH_3,
        exact=True,
        devices=_GPU,
        dtypes=_HALF,
        head_dims=_FLASH_HEAD_DIMS,
        compute_capability=((9, 0), (9, 0)),
        install="build `hopper/` of github.com/Dao-AILab/flash-attention",
    ),
    AttentionBackend.FLASH: Capability(
        AttentionBackendName.FLASH,
        exact=True,
        devices=_GPU,
        dtypes=_HALF,
        head_dims=_FLASH_HEAD_DIMS,
        compute_capability=((8, 0), (99, 0)),
        install="pip install 'cogvx_fast[flash]'",
    ),
    **{
        backend: Capability(
            None,
            exact=True,
            impl=backend.value,
            devices=frozenset(("cpu",)),
            dtypes=frozenset((torch.bfloat16,)),
            head_dims=frozenset((64,)),
            why_unavailable=functools.partial(ops.why_unavailable, "attention", backend.value),
            install="comes with cogvx_fast",
        )
        for backend in (AttentionBackend.AMX, AttentionBackend.AVX512)
    },
    AttentionBackend.TRITON: Capability(
        None,
        exact=True,
        impl="triton",
        devices=_GPU,
        dtypes=_HALF,
        head_dims=frozenset((64, 128)),
        compute_capability=((8, 0), (99, 0)),
        why_unavailable=functools.partial(ops.why_unavailable, "attention", "triton"),
        install="pip install triton",
    ),
    AttentionBackend.TRITON_INT8: Capability(
        None,
        exact=False,
        impl="triton",
        operation="int8_attention",
        devices=_GPU,
        dtypes=_HALF,
        head_dims=frozenset((64, 128)),
        compute_capability=((8, 0), (99, 0)),
        # By the count of cycles in docs/kernel-tables.md: there products are the limit, and half of them run at twice
        # the rate. On 9.0 at head dim 64 exponentials are, which stay as they were; 10.0 and 12.0 are not assessed.
        gains_on=frozenset(((8, 0), (8, 6), (8, 9))),
        why_unavailable=functools.partial(ops.why_unavailable, "attention", "triton"),
        install="pip install triton",
    ),
    AttentionBackend.SDPA: Capability(AttentionBackendName.NATIVE, exact=True),
    **{
        backend: Capability(
            None,
            exact=True,
            kernel=kernel,
            devices=_GPU,
            dtypes=_HALF,
            head_dims=head_dims,
            compute_capability=((8, 0), (99, 0)),
            why_not=functools.partial(sdpa.why_not, name),
        )
        for backend, name, kernel, head_dims in (
            # Up to 128 everywhere; 9.0 has more, which this family has not.
            (AttentionBackend.SDPA_CUDNN, SDPBackend.CUDNN_ATTENTION, sdpa.cudnn, frozenset(range(8, 129, 8))),
            (AttentionBackend.SDPA_FLASH, SDPBackend.FLASH_ATTENTION, sdpa.flash, _FLASH_HEAD_DIMS),
        )
    },
    AttentionBackend.XFORMERS: Capability(
        AttentionBackendName.XFORMERS,
        exact=True,
        devices=_GPU,
        dtypes=_HALF | {torch.float32},
        compute_capability=((7, 5), (99, 0)),
        install="pip install 'cogvx_fast[xformers]'",
    ),
    AttentionBackend.SAGE: Capability(
        AttentionBackendName.SAGE,
        exact=False,
        devices=_GPU,
        dtypes=_HALF,
        head_dims=frozenset((64, 96, 128)),
        compute_capability=((8, 0), (99, 0)),
        install="pip install sageattention",
    ),
}
# What `auto` tries, fastest first: flash-attn 3 is the fastest on Hopper, our kernels on CPUs with units for bf16;
# everywhere else torch's own SDPA takes a kernel without a package: cuDNN's on 9.0 and 10.0, flash-attention 2 on other
# GPUs. Our Triton kernel is not among them as long as no GPU has measured it.
_AUTO = (AttentionBackend.FLASH_3, AttentionBackend.AMX, AttentionBackend.AVX512, AttentionBackend.SDPA)


@dataclass(frozen=True)
class Resolution:
    """The backend that was chosen, and why each of the others that `auto` tried was not."""

    backend: AttentionBackend
    rejected: dict[AttentionBackend, str] = field(default_factory=dict)

    @property
    def capability(self) -> Capability:
        return CAPABILITIES[self.backend]

    def __str__(self) -> str:
        reasons = "; ".join(f"not {backend}: {reason}" for backend, reason in self.rejected.items())
        return f"{self.backend}" + (f" ({reasons})" if reasons else "")


def resolve(
    requested: AttentionBackend,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    exact: bool = True,
    in_8_bits: bool = False,
) -> Resolution:
    """Choose the backend for a device, dtype and head dim.

    Args:
        exact: refuse backends that change more than the order of rounding.
        in_8_bits: `auto` tries attention in 8 bits first, on GPUs where it gains time; for tiers that are not exact.

    Raises:
        ValueError: for a backend that cannot work here, with the reason and what can.
    """
    device = torch.device(device)
    reasons = {b: why_impossible(b, exact) or why_not_here(b, device, dtype, head_dim) for b in CAPABILITIES}
    if requested is AttentionBackend.AUTO:
        replacement = replaced_sdpa()
        if replacement is not None:
            reason = f"torch's scaled_dot_product_attention was replaced by {replacement}, which is taken"
            return Resolution(AttentionBackend.SDPA, {AttentionBackend.AUTO: reason})
        tried = (AttentionBackend.TRITON_INT8, *_AUTO) if in_8_bits else _AUTO
        reasons |= {b: reasons[b] or _why_no_gain(b, device) for b in tried}
        chosen = next(b for b in tried if reasons[b] is None)
        before = tried[: tried.index(chosen)]
        return Resolution(chosen, {b: why for b in before if (why := reasons[b]) is not None})
    if reasons[requested] is not None:
        raise ValueError(_refusal(requested, reasons))
    return Resolution(requested)


def replaced_sdpa() -> str | None:
    """The name of what somebody has put in the place of `torch.nn.functional.scaled_dot_product_attention`, as
    SageAttention's documentation tells to; None: it is torch's own."""
    function = F.scaled_dot_product_attention
    if function is torch._C._nn.scaled_dot_product_attention:
        return None
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"


def check_available(requested: AttentionBackend, exact: bool = True) -> None:
    """Raise a ValueError for a backend that can work on no device: its package is missing, or the tier forbids it."""
    reasons = {b: why_impossible(b, exact) for b in CAPABILITIES}
    if reasons.get(requested) is not None:
        raise ValueError(_refusal(requested, reasons))


def why_impossible(backend: AttentionBackend, exact: bool) -> str | None:
    """What keeps `backend` from working on any device, or None."""
    capability = CAPABILITIES[backend]
    if exact and not capability.exact:
        return "it changes more than rounding, which the exact tier does not"
    if capability.dispatch is None:
        return None
    try:
        _check_attention_backend_requirements(capability.dispatch)
    except RuntimeError:
        return f"its package is not installed, or too old ({capability.install})"
    return None


def why_not_here(backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The first thing about this device, dtype and head dim that keeps `backend` from working, or None."""
    capability = CAPABILITIES[backend]
    if capability.devices is not None and device.type not in capability.devices:
        return f"it runs on {_listed(capability.devices)}, not on {device.type}"
    if capability.dtypes is not None and dtype not in capability.dtypes:
        return f"it takes {_listed(capability.dtypes)}, not {dtype}"
    if capability.head_dims is not None and head_dim not in capability.head_dims:
        return f"it has no kernel for head dim {head_dim}"
    if capability.compute_capability is not None:
        lowest, highest = capability.compute_capability
        try:
            own = torch.cuda.get_device_capability(device)
        except (AssertionError, RuntimeError):  # a torch without CUDA, or no driver
            return "torch finds no GPU here"
        if not lowest <= own <= highest:
            return f"it needs compute capability {_dotted(lowest)} to {_dotted(highest)}, this GPU has {_dotted(own)}"
    if capability.why_unavailable is not None and (reason := capability.why_unavailable()) is not None:
        return reason
    return capability.why_not(device, dtype, head_dim) if capability.why_not is not None else None


def _why_no_gain(backend: AttentionBackend, device: torch.device) -> str | None:
    """Why a backend that works on this device is not known to gain time there, or None."""
    gains_on = CAPABILITIES[backend].gains_on
    if gains_on is None or torch.cuda.get_device_capability(device) in gains_on:
        return None
    own = _dotted(torch.cuda.get_device_capability(device))
    return f"it gains time on compute capability {', '.join(map(_dotted, sorted(gains_on)))}, this GPU has {own}"


def _refusal(requested: AttentionBackend, reasons: dict[AttentionBackend, str | None]) -> str:
    working = ", ".join(f"{b.value!r}" for b, reason in reasons.items() if reason is None)
    return f"attention={requested.value!r} cannot work here: {reasons[requested]}; what can: {working}"


def _listed(names: frozenset) -> str:
    return ", ".join(sorted(str(name) for name in names))


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
