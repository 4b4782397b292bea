"""`cogvx-fast calibrate`: find the schedules by which engine "turbo" leaves steps out."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import OutputError, UsageError, exit_codes, messages, results, say
from .generate import Precision, Scheduler

if TYPE_CHECKING:
    from cogvx_fast.turbo.calibration import Plan
    from cogvx_fast.turbo.files import ScheduleFile

LEAST_STEPS, LEAST_PROMPTS = 10, 3
CHECKED = 3  # every how many-th prompt is one that schedules are checked on


def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a CogVideoX in diffusers format.")],
    prompts: Annotated[
        Path,
        typer.Option(
            help="A text file with one prompt a line. Of every three, two are learned from and one is a check."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the schedules go, a .json.")] = Path("schedule.json"),
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="How closely the prompts are followed.")] = 6.0,
    frames: Annotated[int | None, typer.Option(help="Number of frames.", show_default="the model's")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's")] = None,
    seed: Annotated[
        int, typer.Option(help="Of the first prompt's noise; each further prompt takes the next number.")
    ] = 0,
    dtype: Annotated[
        Precision | None,
        typer.Option(help="Precision; in float32 small errors do not drown in rounding.", show_default="the model's"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="the best there is")
    ] = None,
    scheduler: Annotated[Scheduler | None, typer.Option(help="Scheduler.", show_default="the model's own")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a calibration that was stopped.")] = False,
) -> None:
    """Find which steps engine "turbo" can leave out of a checkpoint's generations, and what that costs.

    Makes some full videos, searches for the best schedule with each number of evaluations of the network, and makes
    the videos of other prompts by them. Use what it writes: generate --engine turbo --schedule OUT.
    """
    parts = Path(f"{out}.parts")  # results in between
    with exit_codes(f"what is finished is kept in {parts}; the same command with --resume goes on"):
        from cogvx_fast.files import try_place

        from . import loading, validate
        from .checkpoint import read_checkpoint
        from .prediction import request_of, room_error

        texts = _prompts(prompts)
        _check_out(out, parts, resume, try_place)
        with _named("MODEL"):
            checkpoint = read_checkpoint(model)
            validate.check_text_only(checkpoint)
        if not LEAST_STEPS <= steps <= checkpoint.num_train_timesteps:
            raise UsageError("--steps", steps, f"must be {LEAST_STEPS} to {checkpoint.num_train_timesteps}")
        validate.check_numbers(steps, guidance, None, seed, 1, checkpoint)
        pixels = validate.video_size(height, width, checkpoint.variant)
        num_frames = validate.num_frames(frames, checkpoint.variant)
        chosen_device = loading.choose_device(device)
        chosen_dtype = loading.choose_dtype(dtype and dtype.value, chosen_device, checkpoint)
        engine = loading.choose_engine(None, None, checkpoint)
        size = {"height": pixels[0], "width": pixels[1], "num_frames": num_frames}
        too_much = room_error(
            checkpoint, request_of(checkpoint, *pixels, num_frames), chosen_dtype, chosen_device, engine
        )
        if too_much is not None:
            raise validate.too_large(frames, height, width, checkpoint, too_much, "MODEL")
        settings = {"model": model, "prompts": texts, "steps": steps, "guidance": guidance, "seed": seed, **size}
        settings |= {"dtype": chosen_dtype, "scheduler": scheduler and scheduler.value}
        _check_settings(parts, settings)
        with loading.within_memory(chosen_device, num_frames, *pixels):
            with loading.quiet_libraries(), messages.status(f"loading {checkpoint.source}"), _named("MODEL"):
                pipe = loading.load_pipeline(
                    checkpoint, chosen_dtype, chosen_device, engine, scheduler and scheduler.value
                )
            size["max_sequence_length"] = checkpoint.variant.max_text_seq_length
            plan = _plan(texts, size, steps, guidance, seed)
            found = _carried_out(pipe, plan, parts)
        try:
            found.write(out)
        except OSError as error:
            raise OutputError(f"{out} could not be written: {error.strerror}; {parts} is kept") from error
        shutil.rmtree(parts, ignore_errors=True)
        _show(found, plan)
        say(results, f"wrote {out}: schedules of {min(found.schedules)} to {max(found.schedules)} of {steps} steps")


def _prompts(path: Path) -> list[str]:
    from . import validate

    with _named("--prompts"):
        texts = validate.read_prompts(None, path)
    if len(texts) < LEAST_PROMPTS:
        raise UsageError("--prompts", repr(str(path)), f"has {len(texts)}; must have at least {LEAST_PROMPTS}")
    return texts


@contextlib.contextmanager
def _named(argument: str) -> Iterator[None]:
    """Within the block an error is one of `argument`."""
    try:
        yield
    except UsageError as error:
        raise error.renamed(argument) from None


def _check_out(out: Path, parts: Path, resume: bool, try_place: Callable[[Path], None]) -> None:
    if out.suffix != ".json":
        raise UsageError("--out", repr(str(out)), "must end in .json")
    try:
        try_place(out)
        try_place(parts / "settings.json")
    except OSError as error:
        raise UsageError("--out", repr(str(out)), f"cannot be written ({error.strerror})") from None
    if parts.exists() and not resume:
        raise UsageError(
            "--out", repr(str(out)), f"a calibration was stopped there: --resume goes on, or remove {str(parts)!r}"
        )


def _check_settings(parts: Path, settings: dict[str, Any]) -> None:
    """What lies in `parts` is of these settings, or nothing lies there yet."""
    from cogvx_fast.files import write_whole

    path = parts / "settings.json"
    try:
        there = json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError, RecursionError):
        there = {}
    if there is None:
        write_whole(path, json.dumps(settings, indent=1).encode())
        return
    for name, value in settings.items():
        if not isinstance(there, dict) or there.get(name) != value:
            raise UsageError(
                "--resume", None, f"what was stopped had another {name}; remove {str(parts)!r} to start anew"
            )


def _plan(texts: list[str], size: dict[str, int], steps: int, guidance: float, seed: int) -> Plan:
    from cogvx_fast.turbo.calibration import Plan

    calls = [{"prompt": text, "seed": seed + number, **size} for number, text in enumerate(texts)]
    checks = calls[CHECKED - 1 :: CHECKED]
    return Plan([call for call in calls if call not in checks], checks, steps, guidance)


def _carried_out(pipe: Any, plan: Plan, parts: Path) -> ScheduleFile:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from cogvx_fast.turbo.calibration import calibrate as run

    from . import loading

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} evaluations"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with loading.quiet_libraries():
        say(messages, f"{plan.evaluations:,} evaluations of the network: {_duration(_seconds(pipe, plan))}")
        with Progress(*columns, console=messages) as progress:
            task = progress.add_task("calibrate", total=plan.evaluations)
            try:
                return run(pipe, plan, parts, lambda done: progress.advance(task, done))
            except ValueError as error:
                raise OutputError(f"nothing could be learned: {' '.join(str(error).split())}") from error


def _seconds(pipe: Any, plan: Plan) -> float:
    """How long it will take, from one short generation after another that warms up."""
    import torch

    call, each = {name: value for name, value in plan.calls[0].items() if name != "seed"}, 0.0
    for steps in (1, 2):
        generator = torch.Generator().manual_seed(0)
        pipe(**call, num_inference_steps=steps, guidance_scale=plan.guidance, generator=generator, output_type="latent")
        each = pipe.stage_seconds["denoise"] / steps
    return each * plan.evaluations


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"about {seconds:.0f} s, and decoding"
    return (
        f"about {seconds / 60:.0f} min, and decoding"
        if seconds < 7200
        else f"about {seconds / 3600:.1f} h, and decoding"
    )


def _show(found: ScheduleFile, plan: Plan) -> None:
    """Evaluations against distance: a table with a bar a line."""
    checked = [found.schedules[number] for number in plan.checked if number in found.schedules]
    most = max((entry.distance.psnr_db for entry in checked if entry.distance), default=1.0)
    say(
        results,
        f"{'evaluations':>11}  {'PSNR':>8}  {'worst':>8}  against all {plan.steps} steps, {len(plan.checks)} clips",
    )
    for entry in checked:
        if entry.distance is not None:
            numbers = f"{entry.distance.psnr_db:5.1f} dB  {entry.distance.worst_psnr_db:5.1f} dB"
            bar = "▇" * max(1, round(24 * entry.distance.psnr_db / max(most, 1.0)))
            say(results, f"{entry.evaluations:>11}  {numbers}  {entry.strip}  {bar}")
