"""Result rows of what was measured: one for each method and number of evaluations."""

from __future__ import annotations

from typing import Any

from cogvx_fast.bench.accuracy import relative_error_at
from cogvx_fast.bench.engine import as_plain
from cogvx_fast.bench.provenance import Provenance
from cogvx_fast.bench.rows import Row
from cogvx_fast.bench.skipping import Skipping

from .methods import FAST, REFERENCES
from .runs import Runs, Wanted
from .setting import Setting

FACTORS = ("background", "color", "shape", "motion")


def figures(clips: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, float]:
    """Means over clips and the worst PSNR; of the demo checkpoint, the shares of clips that show what was asked."""
    found = {
        "evaluations": _mean(clips, "evaluations"),
        "psnr_db": _mean(clips, "psnr_db"),
        "psnr_lowest_db": min(clip["psnr_db"] for clip in clips),
        "ssim": _mean(clips, "ssim"),
        "temporal_psnr_db": _mean(clips, "temporal_psnr_db"),
        "motion_ratio": _mean(clips, "motion"),
    }
    if all("flip" in clip for clip in clips):
        found["flip"] = _mean(clips, "flip")
    if all("shows" in clip for clip in clips):
        for name in FACTORS:
            found[f"{name}_accuracy"] = _mean([clip["shows"] for clip in clips], name)
            found[f"{name}_difference"] = found[f"{name}_accuracy"] - _mean([c["shows"] for c in reference], name)
    return found


def _mean(clips: list[dict[str, Any]], name: str) -> float:
    return sum(clip[name] for clip in clips) / len(clips)


def row(runs: Runs, setting: Setting, wanted: Wanted, run: str, command: str, provenance: Provenance) -> Row:
    """The row of a method at a number of evaluations, all of whose batches are there, as those of its reference."""
    method, evaluations = wanted
    clips, parameters = runs.clips(wanted), runs.parameters(wanted) or {}
    extras: dict[str, Any] = {"evaluations_asked": evaluations}
    if clips is None:
        gate, detail, error = "red", parameters["unreachable"], None
    else:
        reference = runs.clips((REFERENCES[method.base], setting.steps))
        assert reference is not None  # a reference reaches its number
        extras |= figures(clips, reference)
        extras |= {name: value for name, value in parameters.items() if isinstance(value, int | float)}
        gate, error = "lossy", relative_error_at(extras["psnr_db"])
        detail = f"PSNR {extras['psnr_db']:.1f} dB, {extras['psnr_lowest_db']:.1f} of the worst clip,"
        detail += f" at {extras['evaluations']:.1f} evaluations"
    count = len(setting.prompts.texts)
    return Row(
        run=run,
        series=Skipping.name,
        workload=setting.workload,
        stage="generation",
        measures=f"{count} of {setting.prompts.name}, {setting.steps} steps, guidance {setting.guidance:g}, against all"
        f" steps in {setting.dtype}",
        shapes={"batch": setting.batch, "steps": setting.steps, "clips": count, "evaluations": evaluations},
        dtype=setting.dtype,
        contender=method.name,
        engine=as_plain(method.engine(runs.job(evaluations))) if method.base == FAST else None,
        engine_report=[method.what],
        command=command,
        gate=gate,
        gate_detail=detail,
        reference=f"all steps by {'cogvx_fast, engine=exact' if method.base == FAST else 'diffusers'}, same seeds",
        error=error,
        n=0 if clips is None else len(clips),
        extras=extras,
        provenance=provenance,
    )
