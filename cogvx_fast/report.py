"""What the engine does to a pipeline, in words: a function of the plan, and afterwards of what really ran."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline

from . import machine
from .config import TIERS, CompileMode, EngineConfig
from .family import latent_frames
from .hooks import unwrapped
from .plan import UNLIMITED, EnginePlan
from .session import Ran
from .transformer import FastCogVideoXTransformer3DModel, why_not_adopted
from .transformer.attention import FastCogVideoXAttnProcessor
from .transformer.block import FastCogVideoXBlock
from .vae import FastAutoencoderKLCogVideoX

MEMORY, THREADS, STEPS, PARALLEL = "memory", "threads", "steps", "parallel"
PROJECTIONS, QUANTIZE, COMPILE, PRECISION, VAE = "projections", "quantize", "compile", "precision", "vae"


@dataclass(frozen=True)
class ReportLine:
    """What became of one part: `applied` or not, and the reason or the extent in words."""

    name: str
    applied: bool
    detail: str


@dataclass(frozen=True)
class EngineReport:
    """What was chosen, what was left out, and why. Printing it gives a table.

    Attributes:
        config: what was asked for.
        tier: the contract that is kept.
    """

    config: EngineConfig
    tier: str
    lines: tuple[ReportLine, ...]

    def __str__(self) -> str:
        width = max(len(line.name) for line in self.lines)
        head = f"engine: {self.tier} (changes {TIERS[self.tier]})"
        rows = [f"  {'on ' if line.applied else 'off'}  {line.name:<{width}}  {line.detail}" for line in self.lines]
        return "\n".join([head, *rows])

    def line(self, name: str) -> ReportLine:
        """The line of that name."""
        return next(line for line in self.lines if line.name == name)


def describe(
    pipeline: DiffusionPipeline, config: EngineConfig, plan: EnginePlan, quantized: str, ran: Ran | None
) -> EngineReport:
    """The report of a pipeline.

    Args:
        config: what was asked for.
        quantized: what was quantized when the pipeline was made, in words; empty for nothing.
        ran: what ran in the last generation; None: none has.
    """
    lines = [ReportLine(MEMORY, True, plan.memory)] if plan.memory_limit != UNLIMITED else []
    lines.extend(_transformer(pipeline.transformer, plan, quantized, ran))
    if config.skips_steps:
        lines.append(_steps(plan, ran))
    lines.append(_precision(plan, getattr(pipeline, "_why_dtype", "")))
    if ran is not None and ran.why_threads:
        said = f"{ran.threads} in this generation: at its start {ran.why_threads}"
        lines.append(ReportLine(THREADS, False, said))
    lines.append(_vae(pipeline, plan, ran))
    if plan.parallel.processes > 1:
        lines.append(_parallel(plan, ran))
    return EngineReport(config, plan.tier, tuple(lines))


def refused(config: EngineConfig, error: ValueError) -> EngineReport:
    """The report where the engine cannot work while the models are where they are."""
    line = ReportLine("plan", False, f"not where the models are now: {error}")
    return EngineReport(config, config.tier or "exact", (line,))


def _transformer(
    transformer: CogVideoXTransformer3DModel | None, plan: EnginePlan, quantized: str, ran: Ran | None
) -> Iterator[ReportLine]:
    yield _adapters(transformer)
    if transformer is None:
        yield ReportLine("adopt blocks", False, "the pipeline has no transformer")
        return
    reason = why_not_ours(transformer, ran)
    if reason:
        for name in ("adopt blocks", "attention", "modulation table", "text projection", PROJECTIONS):
            yield ReportLine(name, False, reason)
    else:
        yield ReportLine("adopt blocks", True, _blocks(transformer, ran))
        yield _attention(transformer, plan, ran)
        yield _modulation(transformer, plan, ran)
        yield _text(transformer, plan, ran)
        yield _projections(plan, ran)
    yield ReportLine(QUANTIZE, bool(quantized), quantized or f"tier {plan.tier!r} changes no precision")
    yield ReportLine(COMPILE, plan.compile is not CompileMode.OFF and not reason, reason or plan.compile_why)


def _adapters(transformer: CogVideoXTransformer3DModel | None) -> ReportLine:
    names = sorted(getattr(transformer, "peft_config", None) or {})
    if transformer is None or not names:
        return ReportLine("lora", False, "no adapters loaded at this point")
    layers = [module for module in transformer.modules() if hasattr(module, "scaling")]
    if layers and all(layer.disable_adapters for layer in layers):
        return ReportLine("lora", False, f"{', '.join(names)}: disabled")
    active = {name for layer in layers for name in layer.active_adapters}
    return ReportLine("lora", True, ", ".join(name if name in active else f"{name} (not active)" for name in names))


def why_not_ours(transformer: CogVideoXTransformer3DModel, ran: Ran | None) -> str:
    """Why our forward pass does not run, or did not in the last generation, in words; empty where it does."""
    model: Any = unwrapped(transformer)
    if not isinstance(model, FastCogVideoXTransformer3DModel):
        return f"diffusers' own transformer runs: {why_not_adopted(model)}"
    if ran is None or ran.fast:
        return ""
    if ran.steps:
        return ran.why_diffusers
    return (
        "our forward pass was never entered in the last generation: something stands in its place (torch.compile of the"
        " whole transformer, a patched forward, another library's cache), and that ran"
    )


def _blocks(transformer: CogVideoXTransformer3DModel, ran: Ran | None) -> str:
    text = f"{len(transformer.transformer_blocks)} blocks on one joint text-and-video stream"
    if transformer.is_cache_enabled:
        text += f"; diffusers' cache is enabled: {type(transformer._cache_config).__name__}"
    called = 0 if ran is None else sum(block.called for block in ran.blocks)
    if called:
        text += f"; {called} of them are called as diffusers calls them, for what hangs on them or in them"
    foreign = [
        type(block).__name__ for block in transformer.transformer_blocks if not isinstance(block, FastCogVideoXBlock)
    ]
    if foreign:
        text += f"; {len(foreign)} of another class, which are called as they are: {', '.join(dict.fromkeys(foreign))}"
    if ran is not None and ran.fast < ran.steps:
        text += f"; {ran.steps - ran.fast} of {ran.steps} steps not: {ran.why_diffusers}"
    return text


def _attention(transformer: CogVideoXTransformer3DModel, plan: EnginePlan, ran: Ran | None) -> ReportLine:
    found = [block.attn1.processor for block in transformer.transformer_blocks if hasattr(block, "attn1")]
    ours = [processor for processor in found if isinstance(processor, FastCogVideoXAttnProcessor)]
    named = {processor._attention_backend.value for processor in ours if processor._attention_backend is not None}
    detail = f"set by hand: {', '.join(sorted(named))}" if named else str(plan.attention)
    if len(ours) < len(found):
        detail += f"; {len(found) - len(ours)} processors of another kind"
    if ran is not None and ran.ignored_default:
        detail += f"; not {ran.ignored_default}, which `attention_backend` or another model has made diffusers' default"
    if ran is not None and ran.redone:
        detail += f"; {ran.redone} of {ran.steps} steps redone exact, as theirs was not finite"
    return ReportLine("attention", True, detail)


def _modulation(transformer: CogVideoXTransformer3DModel, plan: EnginePlan, ran: Ran | None) -> ReportLine:
    """AdaLN of all steps at once."""
    name = "modulation table"
    if not plan.keeps_modulation:
        return ReportLine(name, False, "EngineConfig.modulation_table=False")
    if ran is not None and not ran.counts["modulation"]:
        return ReportLine(name, False, "computed anew in each step: hooks, or timesteps that are not the scheduler's")
    norms = [
        norm
        for block in transformer.transformer_blocks
        if hasattr(block, "norm1")
        for norm in (block.norm1, block.norm2)
    ]
    size = sum(p.numel() * p.element_size() for norm in norms for p in norm.linear.parameters())
    each = len(norms) * 6 * transformer.proj_out.in_features * plan.dtype.itemsize
    return ReportLine(
        name,
        True,
        f"{size / 1e6:.1f} MB of AdaLN weights read once a generation; table: {each / 1e6:.2f} MB a step"
        + _again(ran, "modulation"),
    )


def _text(transformer: CogVideoXTransformer3DModel, plan: EnginePlan, ran: Ran | None) -> ReportLine:
    name = "text projection"
    if not plan.keeps_text:
        return ReportLine(name, False, "EngineConfig.reuse_text_projection=False")
    if ran is not None and not ran.counts["text_projection"]:
        return ReportLine(name, False, "computed anew in each step: hooks, or embeddings that torch does not watch")
    projection = transformer.patch_embed.text_proj
    width = f"{projection.in_features} to {projection.out_features}"
    return ReportLine(name, True, f"{width}, once a generation" + _again(ran, "text_projection"))


def _again(ran: Ran | None, constant: str) -> str:
    times = 0 if ran is None else ran.counts[constant]
    return f"; computed {times} times, as what it is made from was changed between steps" if times > 1 else ""


def _projections(plan: EnginePlan, ran: Ran | None) -> ReportLine:
    """Q, K and V in one product; how, is decided where the weights are when a generation runs."""
    if ran is None or not ran.blocks:
        return ReportLine(
            PROJECTIONS, True, f"{plan.product}, at a generation's first step, where the weights are then"
        )
    blocks = ran.blocks
    merged = sum(block.merged for block in blocks)
    parts = [f"Q, K and V in one product in {merged} of {len(blocks)} blocks"]
    if merged < len(blocks):
        parts.append("the others have adapters, hooks or quantized weights: their own modules are called")
    for product in dict.fromkeys(block.product for block in blocks):
        number = sum(block.product == product for block in blocks)
        if product == "int8" and plan.device.type == "cpu":
            parts.append(f"int8 products of our own in {number}")
        elif product not in ("", "plain"):
            parts.append(f"{product} products of our own, fed by 8-bit norms, in {number}")
    packed = sum(block.packed_bytes for block in blocks)
    if packed:
        parts.append(f"weights packed for oneDNN, {packed / 1e6:.1f} MB more while a generation runs")
    for operations, language in (("cpu", "C++"), ("triton", "Triton")):
        number = sum(block.operations == operations for block in blocks)
        if number:
            parts.append(f"norms, gates and rotations in {language} in {number}")
    applied = bool(merged or packed or len(parts) > 2)
    if plan.why_not_cpp:
        parts.append(f"norms, gates and rotations as torch's own operations: {plan.why_not_cpp}")
    return ReportLine(PROJECTIONS, applied, "; ".join(parts))


def _steps(plan: EnginePlan, ran: Ran | None) -> ReportLine:
    """Which steps are computed: as planned, or as it came in the last generation."""
    skipped = None if ran is None else ran.skipped
    if ran is not None and ran.steps == 0 and skipped is None:
        return ReportLine(STEPS, False, "all were computed: our forward pass was never entered")
    schedule = plan.steps if skipped is None else skipped.schedule
    if isinstance(schedule, str):
        return ReportLine(STEPS, True, "which are computed depends on their number: said after a generation")
    strip = schedule.strip if skipped is None else skipped.strip
    parts = [f"{strip} {strip.count('#')} of {len(strip)} computed", schedule.source]
    parts.append("distance not measured" if schedule.distance is None else f"distance found: {schedule.distance}")
    if skipped is not None:
        parts.append(f"{skipped.bytes_kept / 1e6:.2f} MB kept")
        if skipped.why_computed:
            parts.append(f"some computed that the schedule predicts: {skipped.why_computed}")
    return ReportLine(STEPS, "." in strip, "; ".join(parts))


def _precision(plan: EnginePlan, why: str) -> ReportLine:
    """Which dtype, and on a CPU whether another is what it is good at. The engine casts nothing by itself.

    Args:
        why: it is that one, where loading was not told; "" where it was.
    """
    name, units = str(plan.dtype).removeprefix("torch."), machine.cpu_bf16_units()
    if why:
        return ReportLine(PRECISION, True, f"{name}, {why}: no dtype was given")
    if plan.device.type != "cpu":
        return ReportLine(PRECISION, True, name)
    if plan.dtype == torch.bfloat16:
        return ReportLine(
            PRECISION, units is not None, f"{name} on {units}" if units else f"{name}, without units for it"
        )
    better = f"; this CPU's {units} multiply bfloat16 several times as fast" if units else ""
    return ReportLine(PRECISION, not better, name + better)


def _parallel(plan: EnginePlan, ran: Ran | None) -> ReportLine:
    """How many processes share which part, and what each of them computed whole all the same."""
    parts = [f"{plan.parallel.processes} processes: {plan.parallel}"]
    whole = {} if ran is None else ran.why_whole
    parts += [f"the {part} whole in each: {why}" for part, why in whole.items()]
    return ReportLine(PARALLEL, not whole, "; ".join(parts))


def _vae(pipeline: DiffusionPipeline, plan: EnginePlan, ran: Ran | None) -> ReportLine:
    """What decoding takes, for the latents that were decoded last, or of the model's own size."""
    vae = unwrapped(pipeline.vae)
    if not plan.vae.ours or not isinstance(vae, FastAutoencoderKLCogVideoX):
        return ReportLine(VAE, False, plan.vae.why or "diffusers' own code runs")
    shape = () if ran is None else ran.latents
    if shape and ran is not None and (ran.vae_why_diffusers or not ran.vae_entered):
        why = ran.vae_why_diffusers or (
            "our autoencoder was never entered in the last generation: something stands in its place (torch.compile of"
            " its decode, or a decode of somebody's own), and that ran"
        )
        return ReportLine(VAE, False, f"diffusers' own code ran: {why}" if ran.vae_entered else why)
    if not shape and pipeline.transformer is not None:
        size = pipeline.transformer.config
        frames = latent_frames(int(size.sample_frames))
        shape = (1, vae.config.latent_channels, frames, size.sample_height, size.sample_width)
    if not shape:
        return ReportLine(VAE, True, "layer by layer on channels-last frames")
    what = f"latents of {shape[0]}x{shape[2]}x{shape[3]}x{shape[4]}"
    try:
        sliced = f"{vae.plan_decode(shape, plan=plan.vae)} planned for {what}"
    except ValueError as error:
        sliced = f"will refuse {what}: {error}"
    asked = [name for name, on in (("tiling", vae.use_tiling), ("slicing", vae.use_slicing)) if on]
    left = f"; {' and '.join(asked)} on: diffusers' own code, without a plan, where they apply" if asked else ""
    return ReportLine(VAE, True, f"layer by layer on channels-last frames; {sliced}{left}")
