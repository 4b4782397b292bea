"""Who runs the autoencoder: our layers and what computes them, or diffusers' own code, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from cogvx_kernels import ops
from diffusers import AutoencoderKLCogVideoX
from torch import nn

from ..hooks import hooks_of_diffusers, moves_weights, unwrapped
from ..plan import UNLIMITED, VaePlan

# Methods whose work our layers do, or that diffusers' code calls on the way of what they leave to it.
METHODS = (
    *("encode", "decode", "forward", "_encode", "_decode"),
    *("tiled_encode", "tiled_decode", "blend_v", "blend_h"),
)


def choose_vae(
    device: torch.device,
    dtype: torch.dtype,
    fast: bool | None,
    budget: int | None,
    autoencoder: nn.Module | None,
) -> VaePlan:
    """The plan of an autoencoder that runs on `device` in `dtype`.

    Args:
        fast: whether our layers run; None: where they keep the contract of the exact tier.
        budget: bytes that the layers' tensors may take; `UNLIMITED` or None: what costs no time.
        autoencoder: diffusers' own, or ours; None: there is none.
    """
    ours = default_plan(device, dtype, budget)
    why = _why_diffusers(ours, fast, autoencoder)
    return ours if why is None else VaePlan(device, dtype, ours=False, why=why)


def default_plan(device: torch.device, dtype: torch.dtype, budget: int | None = UNLIMITED) -> VaePlan:
    """Our layers with what is best on `device` in `dtype`."""
    budget = budget or UNLIMITED
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type == "cuda" and half and ops.why_unavailable("causal_conv3d", "triton", device) is None:
        return VaePlan(device, dtype, operations="triton", convolution="triton", budget=budget)
    on_cpu = device.type == "cpu"
    return VaePlan(
        device,
        dtype,
        operations="cpu" if on_cpu and _has_operations(dtype) else "torch",
        convolution="cpu" if on_cpu and _convolves(dtype) else "torch",
        budget=budget,
    )


def _has_operations(dtype: torch.dtype) -> bool:
    return dtype in ops.CPU_DTYPES and ops.why_unavailable("group_norm_statistics", "cpu") is None


def _convolves(dtype: torch.dtype) -> bool:
    """Whether our own convolutions are the best of this CPU's.

    In fp32 torch's channels-last ones round two to three times as much as those in diffusers' layout. In bf16 ours
    spare products and do them in fp32: faster than bf16 units of the vector kind, slower than AMX.
    """
    if dtype == torch.float32:
        return _why_no_convolutions() is None
    has_amx = torch.cpu._is_amx_tile_supported()
    return dtype == torch.bfloat16 and not has_amx and ops.why_unavailable("packed_conv3d", "winograd") is None


def _why_no_convolutions() -> str | None:
    """What keeps both of ours for fp32 from running on this machine's CPU, or None."""
    reasons = (ops.why_unavailable("packed_conv3d", impl) for impl in ("direct", "winograd"))
    return next(filter(None, reasons), None)


def _why_diffusers(ours: VaePlan, fast: bool | None, autoencoder: nn.Module | None) -> str | None:
    if autoencoder is None:
        return "there is none"
    if fast is False:
        return "EngineConfig.fast_vae=False"
    if fast is None and ours.device.type == "cpu" and ours.dtype == torch.float32 and ours.convolution == "torch":
        return (
            f"fp32 on a CPU without our C++ ({_why_no_convolutions()}): torch's channels-last convolutions round 2 to 3"
            " times as much as diffusers' order, more than the tier allows; EngineConfig(fast_vae=True) takes them"
            " (2e-6 relative)"
        )
    return None if _is_ours(unwrapped(autoencoder)) else why_not_adopted(autoencoder)


def why_not_adopted(autoencoder: nn.Module) -> str | None:
    """What keeps `FastAutoencoderKLCogVideoX.adopt` from taking an autoencoder, and what to do; None if nothing."""
    model = unwrapped(autoencoder)
    if not isinstance(model, AutoencoderKLCogVideoX):
        return f"it is a {type(model).__name__}, not an {AutoencoderKLCogVideoX.__name__}"
    if model.config.act_fn not in ("silu", "swish"):
        return f"its activation is {model.config.act_fn!r}, our layers have SiLU in them"
    if moves_weights(model) or hooks_of_diffusers(model):
        return (
            "it has offloading hooks already; make the pipeline fast first and then call enable_model_cpu_offload(),"
            " enable_sequential_cpu_offload() or enable_group_offload()"
        )
    if model._compiled_call_impl is not None:
        return "it was compiled in place; make the pipeline fast first and then call vae.compile()"
    lost = next((name for name in METHODS if _is_overridden(model, name)), None)
    if lost is not None:
        return (
            f"{type(model).__name__}.{lost} is not diffusers' own and would be lost; leave this autoencoder as it is"
            f" (EngineConfig.fast_vae=False), or override {lost} of a subclass of FastAutoencoderKLCogVideoX instead"
        )
    return None


def _is_ours(model: nn.Module) -> bool:
    return any(kind.__module__.startswith(f"{__package__}.") for kind in type(model).__mro__)


def _is_overridden(model: nn.Module, name: str) -> bool:
    """Whether a method is neither diffusers' nor ours, in the class or on the instance."""
    on_instance = vars(model).get(name)
    if on_instance is not None and name == "forward" and hasattr(model, "_hf_hook"):
        on_instance = model._old_forward  # accelerate's hook calls it
    own = getattr(type(model), name)
    if on_instance is not None and getattr(on_instance, "__func__", on_instance) is not own:
        return True
    return any(not module.startswith(("diffusers.", f"{__package__}.")) for module in _written_in(own))


def _written_in(function: Callable[..., Any] | None) -> Iterator[str]:
    """The modules in which a function and all that it wraps were written."""
    while function is not None:
        yield getattr(function, "__globals__", {}).get("__name__", "")
        function = getattr(function, "__wrapped__", None)
