"""The ordered passes that turn a diffusers pipeline into a fast one, and the report of what they did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline

from . import machine
from .attention import check_available, resolve
from .attention.backends import Capability
from .config import TIERS, AttentionBackend, CompileMode, EngineConfig, QuantizedGemm
from .fit.choice import Choice
from .fit.pipeline import fit_new
from .quantization.pipeline import quantize_pipeline
from .quantization.recipes import RECIPES, QuantizedAttention, Target, refusal, why_not, why_not_native
from .transformer import EngineSession, FastCogVideoXTransformer3DModel
from .transformer.quantized import Int8Linear
from .transformer.scaled import ScaledLinear
from .vae import FastAutoencoderKLCogVideoX, why_not_adopted
from .vae.memory import size_in_words
from .vae.place import Place

MEMORY = "memory"
PROJECTIONS, QUANTIZE, COMPILE, PRECISION, VAE = "projections", "quantize", "compile", "precision", "vae"


@dataclass(frozen=True)
class ReportLine:
    """What one pass did: `applied` or not, and the reason or the extent in words."""

    name: str
    applied: bool
    detail: str


@dataclass(frozen=True)
class EngineReport:
    """What was chosen, what was left out, and why. Printing it gives a table."""

    config: EngineConfig
    lines: tuple[ReportLine, ...]

    def __str__(self) -> str:
        width = max(len(line.name) for line in self.lines)
        head = f"engine: {self.config.tier} (changes {TIERS[self.config.tier]})"
        rows = [f"  {'on ' if line.applied else 'off'}  {line.name:<{width}}  {line.detail}" for line in self.lines]
        return "\n".join([head, *rows])

    def with_line(self, new: ReportLine) -> EngineReport:
        """The same report with `new` in the place of the line of its name."""
        return EngineReport(self.config, tuple(new if line.name == new.name else line for line in self.lines))


def note_adapters(pipeline: DiffusionPipeline, config: EngineConfig) -> ReportLine:
    """LoRA comes first: adapters wrap the linears that the later passes call."""
    adapters = sorted(getattr(pipeline.transformer, "peft_config", None) or {})
    return ReportLine("lora", bool(adapters), ", ".join(adapters) if adapters else "no adapters loaded at this point")


def adopt_blocks(pipeline: DiffusionPipeline, config: EngineConfig) -> ReportLine:
    """Put our transformer, made of the same modules, in the place of diffusers' own."""
    if not isinstance(pipeline.transformer, FastCogVideoXTransformer3DModel):
        pipeline.transformer = FastCogVideoXTransformer3DModel.adopt(pipeline.transformer)
    blocks = len(pipeline.transformer.transformer_blocks)
    return ReportLine("adopt blocks", True, f"{blocks} blocks on one joint text-and-video stream")


def plan_modulation_table(pipeline: DiffusionPipeline, config: EngineConfig) -> ReportLine:
    """AdaLN of all steps at once; the table itself is made when a generation starts."""
    if not config.modulation_table:
        return ReportLine("modulation table", False, "EngineConfig.modulation_table=False")
    transformer = pipeline.transformer
    norms = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm2)]
    size = sum(p.numel() * p.element_size() for norm in norms for p in norm.linear.parameters())
    each = len(norms) * 6 * transformer.proj_out.in_features * torch.empty((), dtype=transformer.dtype).element_size()
    return ReportLine(
        "modulation table",
        True,
        f"{size / 1e6:.1f} MB of AdaLN weights read once a generation; table: {each / 1e6:.2f} MB a step",
    )


def plan_text_projection(pipeline: DiffusionPipeline, config: EngineConfig) -> ReportLine:
    if not config.reuse_text_projection:
        return ReportLine("text projection", False, "EngineConfig.reuse_text_projection=False")
    projection = pipeline.transformer.patch_embed.text_proj
    return ReportLine(
        "text projection", True, f"{projection.in_features} to {projection.out_features}, once a generation"
    )


def check_attention(pipeline: DiffusionPipeline, config: EngineConfig) -> ReportLine:
    """Refuse a backend that can work on no device; which one runs is decided where the pipeline is when it runs."""
    check_available(config.attention, exact=config.tier == "exact")
    return ReportLine("attention", True, f"{config.attention}, chosen for the device when a generation starts")


def choose_attention(pipeline: DiffusionPipeline, config: EngineConfig) -> ReportLine:
    """Bind the backend for the device that the pipeline is on now; called when a generation starts.

    Raises:
        ValueError: for a backend that cannot work there.
    """
    transformer = pipeline.transformer
    processors = transformer.joint_processors
    recipe, device = RECIPES.get(transformer.recipe), pipeline._execution_device
    scheme = config.quantized_attention or (recipe.attention if recipe is not None else None)
    resolution = resolve(
        config.attention,
        device,
        transformer.dtype,
        transformer.config.attention_head_dim,
        exact=config.tier == "exact",
        in_8_bits=config.tier != "exact" and scheme is not None,
    )
    scheme = scheme or QuantizedAttention()
    in_8_bits = resolution.capability.operation == "int8_attention"
    if in_8_bits and scheme.fp8_value:
        from cogvx_kernels.triton.targets import why_not_e4m3

        if (reason := why_not_e4m3(device)) is not None:
            raise ValueError(
                f"EngineConfig.quantized_attention={scheme!r} cannot work here: {reason}; fp8_value=False can"
            )
    for processor in processors:
        processor.backend, processor.scheme = resolution.capability, scheme
    by_hand = {p._attention_backend.value for p in processors if p._attention_backend is not None}
    foreign = len(transformer.transformer_blocks) - len(processors)
    chosen = f"{resolution}: {scheme}" if in_8_bits else str(resolution)
    detail = f"set by hand: {', '.join(sorted(by_hand))}" if by_hand else chosen
    return ReportLine("attention", True, detail + (f"; {foreign} processors of another kind" if foreign else ""))


def exact_fallback(pipeline: DiffusionPipeline) -> Capability | None:
    """What redoes a step in which the backend that was bound overflows; None where that backend is an exact one."""
    transformer = pipeline.transformer
    if all(processor.backend.exact for processor in transformer.joint_processors):
        return None
    head_dim = transformer.config.attention_head_dim
    return resolve(AttentionBackend.AUTO, pipeline._execution_device, transformer.dtype, head_dim).capability


def plan_projections(pipeline: DiffusionPipeline, config: EngineConfig) -> ReportLine:
    """Q, K and V in one product; how, is decided where the weights are when a generation runs."""
    if not config.fuse_projections and not config.pack_weights:
        return ReportLine(PROJECTIONS, False, "EngineConfig.fuse_projections=False, pack_weights=False")
    return ReportLine(PROJECTIONS, True, "planned at a generation's first step, where the weights are then")


def report_projections(session: EngineSession) -> ReportLine:
    """What the session did, in words: how many blocks run on which kind of product, and the bytes that it holds."""
    plans = session.block_plans
    merged = sum(plan.qkv is not None for plan in plans)
    in_int8 = sum(isinstance(plan.qkv, Int8Linear) for plan in plans)
    scaled = [plan.qkv.dtype for plan in plans if isinstance(plan.qkv, ScaledLinear)]
    packed = sum(plan.packed_bytes for plan in plans)
    parts = [f"Q, K and V in one product in {merged} of {len(plans)} blocks"]
    if merged < len(plans):
        parts.append("the others have adapters, hooks or quantized weights: their own modules are called")
    if in_int8:
        parts.append(f"int8 products of our own in {in_int8}")
    for dtype in dict.fromkeys(scaled):
        name = str(dtype).removeprefix("torch.")
        parts.append(f"{name} products of our own, fed by 8-bit norms, in {scaled.count(dtype)}")
    if packed:
        parts.append(f"weights packed for oneDNN, {packed / 1e6:.1f} MB more while a generation runs")
    native = sum(plan.impl == "cpu" for plan in plans)
    if native:
        parts.append(f"norms, gates and rotations in C++ in {native}")
    on_gpu = sum(plan.impl == "triton" for plan in plans)
    if on_gpu:
        parts.append(f"norms, gates and rotations in Triton in {on_gpu}")
    return ReportLine(PROJECTIONS, bool(merged or packed or native or on_gpu), "; ".join(parts))


def quantize(pipeline: DiffusionPipeline, config: EngineConfig) -> ReportLine:
    """Put a copy of the transformer, and of the text encoder, whose linears are quantized in their place.

    Raises:
        ValueError: for a recipe that cannot run where the pipeline will, or a model that is quantized in another way.
    """
    detail = quantize_pipeline(pipeline, config)
    return ReportLine(QUANTIZE, detail is not None, detail or f"tier {config.tier!r} changes no precision")


def check_quantization(pipeline: DiffusionPipeline, config: EngineConfig) -> None:
    """Raise a ValueError if what was quantized cannot run where the pipeline is now; called for each generation."""
    name = pipeline.transformer.recipe
    if name is None:
        return
    recipe, target = RECIPES[name], Target.of(pipeline._execution_device)
    if why_not(recipe, target, pipeline.transformer.dtype) is not None:
        raise ValueError(refusal(recipe, target, pipeline.transformer.dtype))
    if config.gemm is QuantizedGemm.NATIVE:
        reason = why_not_native(recipe, target)
        if reason is not None:
            raise ValueError(f"EngineConfig.gemm='native' cannot work here: {reason}; what can: 'auto', 'torchao'")


def check_compile(pipeline: DiffusionPipeline, config: EngineConfig) -> ReportLine:
    return ReportLine(COMPILE, config.compile is not CompileMode.OFF, f"{config.compile}, decided by the device")


def check_precision(pipeline: DiffusionPipeline, config: EngineConfig) -> ReportLine:
    """Which dtype, and on a CPU whether another is what it is good at. The engine casts nothing by itself."""
    dtype, units = pipeline.transformer.dtype, machine.cpu_bf16_units()
    name = str(dtype).removeprefix("torch.")
    if pipeline._execution_device.type != "cpu":
        return ReportLine(PRECISION, True, name)
    if dtype == torch.bfloat16:
        return ReportLine(
            PRECISION, units is not None, f"{name} on {units}" if units else f"{name}, without units for it"
        )
    better = f"; this CPU's {units} multiply bfloat16 several times as fast" if units else ""
    return ReportLine(PRECISION, not better, name + better)


def choose_compile(pipeline: DiffusionPipeline, config: EngineConfig) -> tuple[CompileMode, ReportLine]:
    """What is compiled on the device that the pipeline is on now."""
    device = pipeline._execution_device
    if config.compile is not CompileMode.AUTO:
        return config.compile, ReportLine(COMPILE, config.compile is not CompileMode.OFF, str(config.compile))
    if device.type == "cuda":
        return CompileMode.BLOCKS, ReportLine(COMPILE, True, "blocks: one graph for all, at the first step")
    detail = f"off on {device.type}: what inductor would fuse is fused already; EngineConfig(compile='blocks') compiles"
    return CompileMode.OFF, ReportLine(COMPILE, False, detail)


def adopt_vae(pipeline: DiffusionPipeline, config: EngineConfig) -> ReportLine:
    """Put our autoencoder, made of the same modules, in the place of diffusers' own; last, as nothing builds on it."""
    reason = _why_not_fast_vae(pipeline, config)
    if reason is not None:
        if isinstance(pipeline.vae, FastAutoencoderKLCogVideoX):
            pipeline.vae = pipeline.vae.as_reference()
        return ReportLine(VAE, False, reason)
    if not isinstance(pipeline.vae, FastAutoencoderKLCogVideoX) or pipeline.vae.memory_budget != config.vae_memory:
        reason = why_not_adopted(pipeline.vae)
        if reason is not None:
            return ReportLine(VAE, False, reason)
        # One of another budget belongs to another pipeline.
        pipeline.vae = FastAutoencoderKLCogVideoX.adopt(pipeline.vae)
        pipeline.vae.memory_budget = config.vae_memory
    vae, size = pipeline.vae, pipeline.transformer.config
    frames = (size.sample_frames - 1) // vae.config.temporal_compression_ratio + 1
    return report_vae(vae, (1, vae.config.latent_channels, int(frames), size.sample_height, size.sample_width))


def _why_not_fast_vae(pipeline: DiffusionPipeline, config: EngineConfig) -> str | None:
    if config.fast_vae is False:
        return "EngineConfig.fast_vae=False"
    dtype, device = getattr(pipeline.vae, "dtype", None), pipeline._execution_device
    fp32_on_cpu = dtype == torch.float32 and device.type == "cpu"
    if config.fast_vae is None and fp32_on_cpu and Place.of(device, dtype).product == "torch":
        return (
            "fp32 on a CPU without a C++ compiler: torch's channels-last convolutions round 2 to 3 times as much as"
            " diffusers' order, more than the tier allows; EngineConfig(fast_vae=True) takes them (2e-6 relative)"
        )
    return None


def report_vae(vae: FastAutoencoderKLCogVideoX, shape: tuple[int, ...]) -> ReportLine:
    """What decoding latents of `shape` `(batch, channels, time, height, width)` takes, in words."""
    what = f"latents of {shape[0]}x{shape[2]}x{shape[3]}x{shape[4]}"
    try:
        plan = f"{vae.plan_decode(shape)} planned for {what}"
    except ValueError as error:
        plan = f"will refuse {what}: {error}"
    asked = [name for name, on in (("tiling", vae.use_tiling), ("slicing", vae.use_slicing)) if on]
    left = f"; {' and '.join(asked)} on: diffusers' own code, without a plan, where they apply" if asked else ""
    return ReportLine(VAE, True, f"layer by layer on channels-last frames; {plan}{left}")


PASSES: tuple[Callable[[DiffusionPipeline, EngineConfig], ReportLine], ...] = (
    note_adapters,
    adopt_blocks,
    check_attention,
    plan_modulation_table,
    plan_text_projection,
    plan_projections,
    quantize,
    check_compile,
    check_precision,
    adopt_vae,
)


def report_memory(choice: Choice | None, limit: int, what: str) -> ReportLine:
    """What a memory limit has led to, in words; `what`: is made."""
    if choice is None:
        return ReportLine(MEMORY, False, "offloading finer than whole models, turned on by hand, is not planned")
    return ReportLine(MEMORY, True, f"{size_in_words(limit)} for {what}: {choice}")


def lower(pipeline: DiffusionPipeline, config: EngineConfig) -> EngineReport:
    """Run all passes on `pipeline`, in place and in order.

    With a memory limit what it leaves open is decided first, and the report's `config` is the one with that.

    Raises:
        ValueError: for an engine that cannot work, or a limit in which nothing fits.
    """
    lines = []
    if config.memory_limit is not None:
        config, choice, what = fit_new(pipeline, config)
        lines.append(report_memory(choice, config.memory_limit, what))
    return EngineReport(config, (*lines, *(run(pipeline, config) for run in PASSES)))
