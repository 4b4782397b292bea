"""Steps about single kernels: attention, products in 8 bits, and where the time of a step goes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cogvx_kernels import ops
from cogvx_kernels.targets import target_of, why_not_e4m3
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogvx_fast.bench.contenders import CONTENDERS
from cogvx_fast.bench.reference import STAGES, build_pipeline
from cogvx_fast.bench.workloads import WORKLOADS

from .setting import Setting

TOKENS = 17776  # of CogVideoX-2b and 5b: 226 of text, 13 x 30 x 45 of video
SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Call = Callable[[], torch.Tensor]


def _timed(setting: Setting, call: Call, exact: torch.Tensor, cut: Callable, operations: int) -> dict[str, Any]:
    """Time and rate of `call`, and how far what `cut` takes of its result is from `exact`."""
    seconds = setting.seconds(call)
    error = (cut(call()).float() - exact).norm() / exact.norm()
    return {"ms": 1000 * seconds, "tera_per_second": operations / seconds / 1e12, "error": float(error)}


def attention(setting: Setting) -> bool:
    """Which attention is the fastest: torch's three, flash-attn, ours in 16 and in 8 bits."""
    sizes = {"toy": (2, 40)} if setting.rehearses else {"2b": (30, TOKENS), "5b": (48, TOKENS)}
    for model, (heads, tokens) in sizes.items():
        query, key, value = (setting.normal(2, tokens, heads, 64, seed=seed) for seed in range(3))
        flop = 4 * 2 * heads * tokens**2 * 64
        exact = F.scaled_dot_product_attention(*(x[:1, :, :1].float().transpose(1, 2) for x in (query, key, value)))
        for name, call in _attentions(setting, query, key, value).items():
            setting.tried(f"{model} {name}", partial(_timed, setting, call, exact, _first_head, flop))
    ours = [row for row in setting.rows if " ours" in row["name"]]
    return bool(ours) and all(row.get("error", 1.0) < 0.05 for row in ours)


def _first_head(output: torch.Tensor) -> torch.Tensor:
    return output[:1, :, :1].transpose(1, 2)


def _first_rows(output: torch.Tensor) -> torch.Tensor:
    return output[:64]


def _attentions(
    setting: Setting, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    across = [x.transpose(1, 2) for x in (query, key, value)]

    def of_torch(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*across).transpose(1, 2)

    calls: dict[str, Callable[[], torch.Tensor]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(*across).transpose(1, 2),
        **{f"sdpa-{name}": lambda backend=backend: of_torch(backend) for name, backend in SDPA.items()},
    }
    impl = "torch" if setting.rehearses else "triton"
    calls["ours"] = lambda: ops.attention(query, key, value, impl=impl)
    calls["ours, int8 Q and K"] = lambda: ops.int8_attention(query, key, value, impl=impl)
    if not setting.rehearses and why_not_e4m3(setting.device) is None:
        e4m3 = torch.float8_e4m3fn
        calls["ours, int8 and e4m3 V"] = lambda: ops.int8_attention(query, key, value, None, e4m3, True, impl=impl)
    with contextlib.suppress(ImportError):
        from flash_attn import flash_attn_func

        calls["flash-attn"] = lambda: flash_attn_func(query, key, value)
    return calls


def eight_bits(setting: Setting) -> bool:
    """Products in 8 bits at the model's shapes: ours, torch._scaled_mm with and without fast sums, torch._int_mm."""
    rows, dim = (64, 128) if setting.rehearses else (2 * TOKENS, 1920)
    shapes = {"qkv": (3 * dim, dim), "out": (dim, dim), "up": (4 * dim, dim), "down": (dim, 4 * dim)}
    impl = "torch" if setting.rehearses else "triton"
    types = [torch.int8] + ([torch.float8_e4m3fn] if why_not_e4m3(setting.device) is None else [])
    for name, (out, inner) in shapes.items():
        x, weight = setting.normal(rows, inner), setting.normal(out, inner, seed=1)
        exact = x[:64].float() @ weight.float().T
        judged = {"exact": exact, "cut": _first_rows, "operations": 2 * rows * out * inner}
        setting.tried(f"{name} 16 bits", partial(_timed, setting, partial(F.linear, x, weight), **judged))
        for dtype in types:
            numbers, scales = ops.quantize_rows(x, dtype, impl=impl)
            weights, channel = ops.quantize_rows(weight, dtype, impl=impl)
            label = str(dtype).removeprefix("torch.").removesuffix("fn")
            for which, call in _products(setting, dtype, numbers, scales, weights, channel).items():
                setting.tried(f"{name} {which} {label}", partial(_timed, setting, call, **judged))
    ours_rows = [row for row in setting.rows if " ours " in row["name"]]
    return bool(ours_rows) and all(row.get("error", 1) < 0.06 for row in ours_rows)


def _products(
    setting: Setting,
    dtype: torch.dtype,
    numbers: torch.Tensor,
    scales: torch.Tensor,
    weights: torch.Tensor,
    channel: torch.Tensor,
) -> dict[str, Call]:
    impl = "torch" if setting.rehearses else "triton"
    given = (numbers, scales, weights, channel)
    calls: dict[str, Call] = {"ours": partial(ops.scaled_linear, *given, out_dtype=setting.dtype, impl=impl)}
    if dtype is torch.int8:
        return calls | {"_int_mm, then scales,": lambda: torch._int_mm(numbers, weights.T) * scales[:, None] * channel}
    options: dict[str, Any] = {"scale_a": scales[:, None], "scale_b": channel[None], "out_dtype": setting.dtype}
    for fast in (False, True):
        name = f"_scaled_mm, {'fast' if fast else 'fp32'} sums,"
        calls[name] = partial(torch._scaled_mm, numbers, weights.T, use_fast_accum=fast, **options)
    return calls


def profile(setting: Setting) -> bool:
    """Where the time of a step and of a decoded clip goes, by kernel, beside the ceilings of the machine code."""
    busiest: Counter[str] = Counter()
    for name, stage in (("dit-2b-full", "dit-step"), ("vae-full", "vae-decode")):
        workload = WORKLOADS[name].rehearsal() if setting.rehearses else WORKLOADS[name]
        if not setting.has_time_for(name):
            continue
        pipe = build_pipeline(workload, setting.dtype, setting.device)
        prepared = CONTENDERS["ours"].build(pipe, workload, stage)
        call = prepared.call or STAGES[stage].make(prepared.pipeline, workload, setting.dtype)
        loop = prepared.loop if STAGES[stage].in_loop else None
        with contextlib.nullcontext() if loop is None else loop():
            for number in range(2):
                call(number)
            with torch.profiler.profile() as found:
                call(2)
        time_of = "self_cpu_time_total" if setting.rehearses else "self_device_time_total"
        events = sorted(found.key_averages(), key=lambda event: -getattr(event, time_of))
        total = sum(getattr(event, time_of) for event in events) or 1
        for event in events[:12]:
            microseconds = getattr(event, time_of)
            busiest[event.key] += microseconds
            setting.add(
                f"{stage} {event.key[:60]}", ms=microseconds / 1000, calls=event.count, share=microseconds / total
            )
        del pipe, prepared, call
    _ceilings(setting, busiest)
    return bool(setting.rows)


def _ceilings(setting: Setting, busiest: Counter[str]) -> None:
    """Of our kernels that were seen: how much of the time the tensor cores can be busy, by their machine code."""
    from cogvx_kernels.aot import compile_all
    from cogvx_kernels.aot.models import model_launches, vae_launches
    from cogvx_kernels.inspect import inspection, machine_code

    if (reason := machine_code.why_unavailable()) is not None:
        setting.left_out["ceilings"] = reason
        return
    target, told = target_of(setting.device), set()
    for launch in [*model_launches(1920, setting.dtype, rotary=False), *vae_launches(setting.dtype)]:
        seen = any(name.startswith(launch.name) for name in busiest)
        if launch.name in told or not seen or not setting.has_time_for(f"ceiling of {launch.name}"):
            continue
        told.add(launch.name)
        for compiled in compile_all(launch, [target], first_only=True):
            one = inspection.inspect(compiled)
            setting.add(f"ceiling {launch.name}", tensor_ceiling=one.tensor_ceiling, configuration=one.configuration)
