"""Decides a generation: from what the user asked for, and where and in what the models are, to one plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from cogvx_kernels import ops

from .attention import resolve as resolve_attention
from .attention import sdpa
from .attention.backends import replaced_sdpa
from .config import AttentionBackend, CompileMode, EngineConfig, QuantizedGemm
from .family import HEAD_DIM
from .memory import Models, Option, Request, fit_generation, fit_new
from .memory.options import offload_of
from .parallel.degrees import ALONE, ParallelConfig
from .parallel.degrees import check as check_degrees
from .parallel.degrees import choose as choose_degrees
from .parallel.ranks import processes
from .plan import AttentionPlan, EnginePlan, Implementation, Offload, Product, VaePlan
from .quantization.recipes import (
    AS_THEY_ARE,
    NATIVE,
    QuantizedAttention,
    Recipe,
    Scheme,
    Target,
    refusal,
    why_no_native_products,
    why_unsupported,
)
from .turbo.schedule import StepSchedule
from .vae import choose_vae

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def resolve(
    config: EngineConfig,
    models: Models,
    device: torch.device,
    dtype: torch.dtype,
    vae: VaePlan,
    request: Request | None = None,
    steps: StepSchedule | Literal["all"] = "all",
    guided: bool = True,
) -> EnginePlan:
    """The plan of one generation on `device`. Precision is as it was chosen when the pipeline was made.

    Args:
        steps: which of them are computed.
        models: of the pipeline, with what they are quantized by.
        dtype: of the transformer.
        vae: the autoencoder's part, with the budget that the user gave.
        request: the size of the generation; looked at where there is a memory limit.
        guided: whether there is guidance, so that a step's batch has two halves.

    Raises:
        ValueError: for an engine that cannot work there, with the reason and what can; a `LimitError` where nothing
            fits the limit.
    """
    plan_of = _planner(config, models, device, dtype, vae, steps, _parallel(config, models, guided))
    if config.memory_limit is None or request is None:
        return plan_of(Option(models.recipe, models.text_scheme, offload_of(models), config.pack_weights))
    return fit_generation(config, models, request, Target.of(device), dtype, plan_of)


def resolve_new(
    config: EngineConfig,
    models: Models,
    target: Target,
    dtype: torch.dtype,
    request: Request,
    device: torch.device | None = None,
) -> EnginePlan:
    """The plan of a pipeline that is being made with a memory limit, or of a checkpoint before it is loaded.

    What the limit and `config` leave open is decided: precision, offloading, packing, the autoencoder's budget.

    Args:
        target: where it will run; `device`: the very one, if that is known.

    Raises:
        LimitError: if nothing fits, not one frame.
    """
    device = device or torch.device(target.device)
    vae = choose_vae(device, dtype, config.fast_vae, config.vae_memory, models.vae)
    return fit_new(config, models, request, target, dtype, _planner(config, models, device, dtype, vae))


def _planner(
    config: EngineConfig,
    models: Models,
    device: torch.device,
    dtype: torch.dtype,
    vae: VaePlan,
    steps: StepSchedule | Literal["all"] = "all",
    parallel: ParallelConfig = ALONE,
) -> Callable[[Option], EnginePlan]:
    head_dim = HEAD_DIM if models.transformer is None else models.variant.attention_head_dim

    def plan_of(option: Option) -> EnginePlan:
        return decide(
            config,
            device=device,
            dtype=dtype,
            head_dim=head_dim,
            vae=vae,
            recipe=option.recipe,
            text_encoder=option.text_encoder,
            packs=option.packs,
            offload=option.offload,
            steps=steps,
            parallel=parallel,
        )

    return plan_of


def decide(
    config: EngineConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    vae: VaePlan,
    recipe: Recipe = AS_THEY_ARE,
    text_encoder: Scheme | str = NATIVE,
    packs: bool | None = None,
    offload: Offload = Offload.NONE,
    steps: StepSchedule | Literal["all"] = "all",
    parallel: ParallelConfig = ALONE,
) -> EnginePlan:
    """The plan of a generation, from what does not depend on its size.

    Args:
        device, dtype: of the transformer.
        head_dim: of its attention.
        vae: the autoencoder's part.
        recipe, text_encoder: what transformer and text encoder are quantized by.
        packs: whether a CPU may hold copies of weights in oneDNN's order; None: as `config` says.
        offload: which weights are elsewhere until they are needed.
        steps: which of them are computed.
        parallel: over how many processes it is split.

    Raises:
        ValueError: for an engine that cannot work there, with the reason and what can.
    """
    tier = config.tier or ("exact" if recipe is AS_THEY_ARE and text_encoder == NATIVE else "balanced")
    _check_recipe(config, recipe, device, dtype)
    packs = config.pack_weights if packs is None else packs

    def computed(compiles: CompileMode) -> tuple[Implementation, Product]:
        operations = _operations(config, compiles, device, dtype, head_dim)
        return operations, _product(config, compiles, recipe, device, dtype, packs)

    operations, product = computed(CompileMode.OFF)
    compiles, why = _compile(config, device, operations, product)
    if compiles is not CompileMode.OFF:
        operations, product = computed(compiles)
    misses_cpp = device.type == "cpu" and config.fuse_operations and compiles is CompileMode.OFF
    why_not_cpp = (_why_no_cpp() if misses_cpp and dtype in ops.CPU_DTYPES else None) or ""
    return EnginePlan(
        tier=tier,
        device=device,
        dtype=dtype,
        recipe=recipe,
        text_encoder="native" if text_encoder == NATIVE else Scheme(text_encoder),
        attention=(_attention if parallel.ring == 1 else _ring_attention)(
            config, tier == "exact", recipe, device, dtype, head_dim
        ),
        operations=operations,
        why_not_cpp=why_not_cpp,
        product=product,
        merges=config.fuse_projections,
        mixes=config.gemm is QuantizedGemm.NATIVE,
        compile=compiles,
        compile_why=why,
        keeps_modulation=config.modulation_table,
        keeps_text=config.reuse_text_projection,
        vae=vae,
        offload=offload,
        steps=steps,
        parallel=parallel,
    )


def _check_recipe(config: EngineConfig, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> None:
    if recipe is AS_THEY_ARE:
        return
    target = Target.of(device)
    if why_unsupported(recipe, target, dtype) is not None:
        raise ValueError(refusal(recipe, target, dtype))
    if config.gemm is QuantizedGemm.NATIVE:
        reason = why_no_native_products(recipe, target)
        if reason is not None:
            raise ValueError(f"EngineConfig.gemm='native' cannot work here: {reason}; what can: 'auto', 'torchao'")


def _compile(
    config: EngineConfig, device: torch.device, operations: Implementation, product: Product
) -> tuple[CompileMode, str]:
    """What is compiled, and why.

    Args:
        operations, product: as they are where nothing is.
    """
    if config.compile is not CompileMode.AUTO:
        return CompileMode(config.compile), str(config.compile)
    by_hand = "EngineConfig(compile='blocks') compiles"
    if device.type != "cuda":
        return CompileMode.OFF, f"off on {device.type}: what inductor would fuse is fused already; {by_hand}"
    at_first = "one graph for all blocks, at the first step"
    if operations == "torch":
        return CompileMode.BLOCKS, f"blocks: norms, gates and rotations are torch's, which inductor fuses; {at_first}"
    if product is Product.MODULES:
        return CompileMode.BLOCKS, f"blocks: torchao's products are tensor code, which inductor fuses; {at_first}"
    # Blocks chain: inductor would look for something to fuse at the first step, and check its guards at every other.
    return (
        CompileMode.OFF,
        f"off: all of a block is launches of our own and products of libraries, none of it is left to fuse; {by_hand}",
    )


def _attention(
    config: EngineConfig, exact: bool, recipe: Recipe, device: torch.device, dtype: torch.dtype, head_dim: int
) -> AttentionPlan:
    value = config.quantized_attention or recipe.attention
    resolution = resolve_attention(
        AttentionBackend(config.attention),
        device,
        dtype,
        head_dim,
        exact=exact,
        in_8_bits=not exact and value is not None,
    )
    value = value or QuantizedAttention()
    backend = fallback = resolution.backend
    if not resolution.capability.exact:
        fallback = resolve_attention(AttentionBackend.AUTO, device, dtype, head_dim).backend
    why = "; ".join(f"not {other}: {reason}" for other, reason in resolution.rejected.items())
    if backend is AttentionBackend.SDPA and config.attention is AttentionBackend.SDPA and replaced_sdpa() is not None:
        why = f"torch's scaled_dot_product_attention was replaced by {replaced_sdpa()}"
    asks = backend is AttentionBackend.SDPA and replaced_sdpa() is None
    kernel = sdpa.chosen(device, dtype, head_dim) if asks else ""
    plan = AttentionPlan(backend, fallback, value, why, kernel)
    if plan.in_8_bits and value.fp8_value:
        from cogvx_kernels.targets import why_not_e4m3

        if (reason := why_not_e4m3(device)) is not None:
            raise ValueError(
                f"EngineConfig.quantized_attention={value!r} cannot work here: {reason}; fp8_value=False can"
            )
    return plan


def _ring_attention(
    config: EngineConfig, exact: bool, recipe: Recipe, device: torch.device, dtype: torch.dtype, head_dim: int
) -> AttentionPlan:
    """Pieces of it are put together by the sums of their exponentials, which torch's kernels give."""
    if config.attention not in (AttentionBackend.AUTO, AttentionBackend.SDPA):
        raise ValueError(
            f"EngineConfig.attention={str(config.attention)!r} cannot work with ParallelConfig.ring: it does not give"
            " the sums of exponentials by which a ring's pieces are put together; 'auto' and 'sdpa' can"
        )
    return AttentionPlan(kernel="that of torch which gives sums of exponentials, for the ring")


def _parallel(config: EngineConfig, models: Models, guided: bool) -> ParallelConfig:
    """The degrees of a generation, for the processes that there are."""
    asked = getattr(models.transformer, "asked_parallel", None)
    if asked is not None and config.parallel is not None:
        raise ValueError("EngineConfig.parallel and transformer.enable_parallelism() both split a clip: leave out one")
    wanted = asked or config.parallel
    if wanted is None:
        return ALONE
    number = processes()
    heads = number if models.transformer is None else models.variant.num_attention_heads
    if not isinstance(wanted, ParallelConfig):
        return choose_degrees(number, heads, guided)
    check_degrees(wanted, number, heads)
    return wanted


def _operations(
    config: EngineConfig, compiles: CompileMode, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Implementation:
    """On a CPU inductor fuses what is between the products better from its torch form."""
    if not config.fuse_operations:
        return "torch"
    if device.type == "cpu":
        fits = compiles is CompileMode.OFF and dtype in ops.CPU_DTYPES
        return "cpu" if fits and _why_no_cpp() is None else "torch"
    if device.type == "cuda":
        fits = dtype in _FLOATS and head_dim & (head_dim - 1) == 0
        return "triton" if fits and ops.why_unavailable("layer_norm_modulate", "triton", device) is None else "torch"
    return "torch"


def _why_no_cpp() -> str | None:
    """What keeps norms, gates and rotations from being our C++ on this machine's CPU, or None."""
    reasons = (ops.why_unavailable(operation, "cpu") for operation in ("layer_norm_modulate", "qk_norm_rope"))
    return next(filter(None, reasons), None)


def _product(
    config: EngineConfig, compiles: CompileMode, recipe: Recipe, device: torch.device, dtype: torch.dtype, packs: bool
) -> Product:
    scheme = next(iter(recipe.schemes), None)
    ours = config.gemm is not QuantizedGemm.TORCHAO
    if device.type == "cuda":
        if scheme in (Scheme.INT8, Scheme.FP8):
            return (
                Product.SCALED
                if ours and ops.why_unavailable("scaled_linear", "triton", device) is None
                else Product.MODULES
            )
        return Product.CUBLASLT if scheme is None and config.fuse_operations else Product.MODULES
    if device.type != "cpu":
        return Product.MODULES
    if scheme is not None:
        fits = scheme is Scheme.INT8 and ours and compiles is CompileMode.OFF and dtype in ops.CPU_DTYPES
        return Product.INT8 if fits and ops.why_unavailable("int8_products", "cpu") is None else Product.MODULES
    if packs and dtype in ops.PACKED_LINEAR_DTYPES and ops.why_unavailable("packed_linear", "cpu") is None:
        return Product.ONEDNN
    buffered = config.fuse_operations and compiles is CompileMode.OFF and dtype == torch.float32
    return Product.BUFFERED if buffered and ops.why_unavailable("bias_gelu", "cpu") is None else Product.MODULES
