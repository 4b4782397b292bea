"""`cogvx-fast generate`: from a prompt to a video file. Checks what is asked for; `making` carries it out."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Annotated

import typer

from .console import exit_codes
from .making import Job, run


class Scheduler(enum.StrEnum):
    """The schedulers of the family."""

    ddim = "ddim"
    dpm = "dpm"


class Precision(enum.StrEnum):
    """The dtypes a pipeline can be loaded in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What the video shows.", show_default=False)
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Where the video goes: .mp4, .gif, .webp, or no suffix for a folder of PNG frames. "
            "Several prompts make out-1.mp4, out-2.mp4, …",
        ),
    ] = Path("out.mp4"),
    prompt_file: Annotated[
        Path | None, typer.Option(help="A text file with one prompt a line, instead of PROMPT.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a CogVideoX in diffusers format.", show_default="the demo checkpoint"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="How closely to follow the prompt; 1 turns guidance off.")] = 6.0,
    negative: Annotated[str | None, typer.Option(help="What the video should not show.", show_default=False)] = None,
    frames: Annotated[
        int | None, typer.Option(help="Number of frames: 8N+1, for CogVideoX 1.5 16N+1.", show_default="the model's")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.", show_default="the model's")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.", show_default="the model's")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise; the same for every prompt.")] = 0,
    fps: Annotated[
        int | None, typer.Option(help="Frames per second of the file.", show_default="8, for CogVideoX 1.5 16")
    ] = None,
    zoom: Annotated[
        int, typer.Option(help="Enlarge the finished frames this many times, for models of few pixels.")
    ] = 1,
    engine: Annotated[
        str | None,
        typer.Option(
            help="What speed may cost; exact: nothing but the order of rounding.",
            show_default="exact, of a quantized model balanced",
        ),
    ] = None,
    speed: Annotated[
        str | None,
        typer.Option(
            help="Of engine turbo: steps for each evaluation of the network, a number, or quality (2) or fast (2.9).",
            show_default="2",
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Of engine turbo: a file that `calibrate` wrote.", show_default="the one that there is for the model"
        ),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="What a video may take on the device, such as 8GiB: takes the most exact way that fits, or the most "
            "exact of --engine.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(
            help="Precision.", show_default="the model's own; on a CPU bfloat16 if it has units for it, or float32"
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="the best there is")
    ] = None,
    scheduler: Annotated[Scheduler | None, typer.Option(help="Scheduler.", show_default="the model's own")] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Also write a contact sheet of all videos, a .png.", show_default=False)
    ] = None,
    preview: Annotated[
        Path | None,
        typer.Option(
            help="A small picture of the video in the making, renewed once a second and removed at the end: .gif, "
            ".webp, or .png for the middle frame. To stop early: Ctrl-C.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a video from a text.

    All prompts are made with the same seed, so that a video does not depend on its place in the prompt file.
    """
    with exit_codes("videos that were finished are kept, nothing partial is left"):
        from cogvx_fast.video import holds_all_frames

        from . import loading, validate
        from .checkpoint import read_checkpoint
        from .prediction import fitted, request_of, room_error

        # What can be refused for less comes first: values, then the checkpoint's JSON files, then what needs torch.
        prompts = validate.read_prompts(prompt, prompt_file)
        negative = None if negative is None else validate.as_text("--negative", negative)
        outputs = validate.output_paths(output, len(prompts))
        validate.check_places(outputs, sheet, fps)
        validate.check_preview(preview, [*outputs, *([] if sheet is None else [sheet])])
        checkpoint = read_checkpoint(validate.model_or_demo(model))
        validate.check_text_only(checkpoint)
        validate.check_numbers(steps, guidance, negative, seed, zoom, checkpoint)
        pixels = validate.video_size(height, width, checkpoint.variant)
        num_frames = validate.num_frames(frames, checkpoint.variant)
        config = loading.choose_engine(engine, memory_limit, checkpoint, speed, schedule)
        loading.check_schedule(config, checkpoint, steps)
        chosen_device = loading.choose_device(device)
        chosen_dtype = loading.choose_dtype(dtype and dtype.value, chosen_device, checkpoint)
        size = request_of(checkpoint, *pixels, num_frames)
        request = dataclasses.replace(size, steps=steps, guided=guidance > 1, streams=True)
        keeps = len(prompts) if sheet is not None else int(holds_all_frames(outputs[0]))
        kept = 3 * zoom**2 * keeps if chosen_device == "cpu" else 0
        too_much = room_error(checkpoint, request, chosen_dtype, chosen_device, config, kept)
        if too_much is not None:
            raise validate.too_large(frames, height, width, checkpoint, too_much)
        if config.memory_limit is not None:
            config = fitted(checkpoint, request, chosen_dtype, chosen_device, config)
        job = Job(
            prompts=prompts,
            outputs=outputs,
            sheet=sheet,
            preview=preview,
            checkpoint=checkpoint,
            height=pixels[0],
            width=pixels[1],
            num_frames=num_frames,
            steps=steps,
            guidance=guidance,
            negative=negative,
            seed=seed,
            fps=fps or checkpoint.variant.default_fps,
            zoom=zoom,
            engine=config,
            dtype=chosen_dtype,
            device=chosen_device,
            scheduler=scheduler and scheduler.value,
        )
        run(job)
