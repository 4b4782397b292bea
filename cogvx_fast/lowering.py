"""The ordered passes that turn a diffusers pipeline into a fast one, and the report of what they did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline

from .config import TIERS, EngineConfig
from .transformer import FastCogVideoXTransformer3DModel


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


PASSES: tuple[Callable[[DiffusionPipeline, EngineConfig], ReportLine], ...] = (
    note_adapters,
    adopt_blocks,
    plan_modulation_table,
    plan_text_projection,
)


def lower(pipeline: DiffusionPipeline, config: EngineConfig) -> EngineReport:
    """Run all passes on `pipeline`, in place and in order."""
    return EngineReport(config, tuple(run(pipeline, config) for run in PASSES))
