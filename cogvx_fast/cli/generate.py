"""`cogvx-fast generate`: the options. `order` checks what is asked for, `making` carries it out."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import exit_codes


class Scheduler(enum.StrEnum):
    """The schedulers of the family."""

    ddim = "ddim"
    dpm = "dpm"


class Precision(enum.StrEnum):
    """The dtypes a pipeline can be loaded in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Offload(enum.StrEnum):
    """Where models are while they do not run."""

    model = "model"
    sequential = "sequential"


class Fit(enum.StrEnum):
    """Those of `pictures.Fit`, which would import Pillow for `--help`."""

    crop = "crop"
    pad = "pad"
    stretch = "stretch"


class TerminalPreview(enum.StrEnum):
    """Those of `graphics.Graphics`, and whether one of them is looked for."""

    auto = "auto"
    kitty = "kitty"
    iterm2 = "iterm2"
    sixel = "sixel"
    off = "off"


_WORDS = "A longer prompt"
_FROM = "Pictures and videos it is made from"
_WHAT = "The video"
_HOW = "Speed, memory and precision"
_FILES = "Files"


def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What the video shows.", show_default=False)
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Where the video goes: .mp4, .gif, .webp, or no suffix for a folder of PNG frames. "
            "Several videos make out-1.mp4, out-2.mp4, …",
            rich_help_panel=_FILES,
        ),
    ] = Path("out.mp4"),
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="A text file with one prompt a line, instead of PROMPT.", show_default=False, rich_help_panel=_FILES
        ),
    ] = None,
    enhance: Annotated[
        bool,
        typer.Option(
            "--enhance",
            help="Have a language model rewrite the prompt as the long descriptions that CogVideoX was trained on: one "
            "behind OPENAI_BASE_URL with OPENAI_API_KEY, or --enhance-local.",
            rich_help_panel=_WORDS,
        ),
    ] = False,
    enhance_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The language model, as that address calls it.",
            show_default="the only one there, of OpenAI gpt-4o-mini",
            rich_help_panel=_WORDS,
        ),
    ] = None,
    enhance_local: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|ID",
            help="A language model that runs here, in transformers' format; the prompt is sent nowhere.",
            show_default=False,
            rich_help_panel=_WORDS,
        ),
    ] = None,
    enhance_pictures: Annotated[
        bool,
        typer.Option(
            help="Show it --image, --last-image or frames of --video, so that the description begins from them.",
            rich_help_panel=_WORDS,
        ),
    ] = True,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a CogVideoX in diffusers format.", show_default="the demo checkpoint"),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:WEIGHT]", help="An adapter, .safetensors or a Hub id; may be repeated.", show_default=False
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="The first frame.", show_default=False, rich_help_panel=_FROM)
    ] = None,
    last_image: Annotated[
        Path | None, typer.Option(help="The last frame.", show_default=False, rich_help_panel=_FROM)
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(help="A video that is made anew, as --strength says.", show_default=False, rich_help_panel=_FROM),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How much of --video is made anew, to 1.", show_default="0.8", rich_help_panel=_FROM),
    ] = None,
    control_video: Annotated[
        Path | None,
        typer.Option(help="A video of poses, edges or depth to follow.", show_default=False, rich_help_panel=_FROM),
    ] = None,
    fit: Annotated[
        Fit, typer.Option(help="How those of another shape come to the video's.", rich_help_panel=_FROM)
    ] = Fit.crop,
    steps: Annotated[int, typer.Option(help="Denoising steps.", rich_help_panel=_WHAT)] = 50,
    guidance: Annotated[
        float, typer.Option(help="How closely to follow the prompt; 1 turns guidance off.", rich_help_panel=_WHAT)
    ] = 6.0,
    dynamic_guidance: Annotated[
        bool, typer.Option("--dynamic-guidance", help="Guidance that grows with the steps.", rich_help_panel=_WHAT)
    ] = False,
    negative: Annotated[
        str | None, typer.Option(help="What the video should not show.", show_default=False, rich_help_panel=_WHAT)
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            help="Number of frames: 8N+1, for CogVideoX 1.5 16N+1.", show_default="the model's", rich_help_panel=_WHAT
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(help="Pixels, a multiple of 16.", show_default="the model's", rich_help_panel=_WHAT),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Pixels, a multiple of 16.", show_default="the model's", rich_help_panel=_WHAT),
    ] = None,
    seed: Annotated[
        str,
        typer.Option(metavar="INTEGER|random", help="Of the noise; the same for every prompt.", rich_help_panel=_WHAT),
    ] = "0",
    num_videos: Annotated[
        int, typer.Option(help="Of each prompt, of this seed and the ones behind it.", rich_help_panel=_WHAT)
    ] = 1,
    fps: Annotated[
        int | None,
        typer.Option(
            help="Frames per second of the file.", show_default="8, for CogVideoX 1.5 16", rich_help_panel=_WHAT
        ),
    ] = None,
    zoom: Annotated[
        int,
        typer.Option(
            help="Enlarge the finished frames this many times, for models of few pixels.", rich_help_panel=_WHAT
        ),
    ] = 1,
    max_sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a prompt; more is cut off.", show_default="the model's", rich_help_panel=_WHAT),
    ] = None,
    scheduler: Annotated[
        Scheduler | None, typer.Option(help="Scheduler.", show_default="the model's own", rich_help_panel=_WHAT)
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="What speed may cost; exact: nothing but the order of rounding.",
            show_default="exact, of a quantized model balanced",
            rich_help_panel=_HOW,
        ),
    ] = None,
    speed: Annotated[
        str | None,
        typer.Option(
            help="Of engine turbo: steps for each evaluation of the network, a number, or quality (2) or fast (2.9).",
            show_default="2",
            rich_help_panel=_HOW,
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Of engine turbo: a file that `calibrate` wrote.",
            show_default="the one that there is for the model",
            rich_help_panel=_HOW,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="How weights are quantized, see docs/quantization.md; means --engine balanced.",
            show_default=False,
            rich_help_panel=_HOW,
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(help="What computes attention.", show_default="the fastest that there is", rich_help_panel=_HOW),
    ] = None,
    compile: Annotated[
        str | None,
        typer.Option(help="What torch.compile takes: off, blocks, full.", show_default="auto", rich_help_panel=_HOW),
    ] = None,
    vae_memory: Annotated[
        str | None,
        typer.Option(
            help="What the autoencoder's frames may take, such as 2GiB.", show_default=False, rich_help_panel=_HOW
        ),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="What a video may take on the device, such as 8GiB: takes the most exact way that fits, or the most "
            "exact of --engine.",
            show_default=False,
            rich_help_panel=_HOW,
        ),
    ] = None,
    offload: Annotated[
        Offload | None,
        typer.Option(
            help="Keep models, or their layers, in the CPU's memory while they do not run.",
            show_default=False,
            rich_help_panel=_HOW,
        ),
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="DEGREES",
            help="Of several processes that torchrun has started, who does what: auto, or such as "
            "guidance=2,ulysses=2. See docs/parallel.md.",
            show_default="auto",
            rich_help_panel=_HOW,
        ),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(
            help="Precision.",
            show_default="the model's own; on a CPU bfloat16 if it has units for it, or float32",
            rich_help_panel=_HOW,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="the best there is", rich_help_panel=_HOW),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            help="A video of this command: as that was made, but for what is given here.",
            show_default=False,
            rich_help_panel=_FILES,
        ),
    ] = None,
    metadata: Annotated[
        bool, typer.Option(help="Keep prompt, seed and settings inside of the video's file.", rich_help_panel=_FILES)
    ] = True,
    sheet: Annotated[
        Path | None,
        typer.Option(
            help="Also write a contact sheet of all videos, a .png.", show_default=False, rich_help_panel=_FILES
        ),
    ] = None,
    preview: Annotated[
        Path | None,
        typer.Option(
            help="A small picture of the video in the making, renewed once a second and removed at the end: .gif, "
            ".webp, or .png for the middle frame. To stop early: Ctrl-C.",
            show_default=False,
            rich_help_panel=_FILES,
        ),
    ] = None,
    terminal_preview: Annotated[
        TerminalPreview,
        typer.Option(
            help="Such a picture in the terminal, by its way of showing pictures. auto: where the environment's "
            "variables name a terminal that has one, outside of tmux and screen.",
            rich_help_panel=_FILES,
        ),
    ] = TerminalPreview.auto,
) -> None:
    """Make a video from a text, and from pictures or a video where the model takes them.

    All prompts are made with the same seed, so that a video does not depend on its place in the prompt file.
    """
    options: dict[str, Any] = {name: value for name, value in locals().items() if name not in ("context", "like")}
    options = {name: value.value if isinstance(value, enum.Enum) else value for name, value in options.items()}
    from . import together

    with exit_codes("videos that were finished are kept, nothing partial is left"), together.joined(device):
        from .like import like as asked_like
        from .making import run
        from .order import Asked, to_job

        asked = Asked(**options | {"lora": tuple(lora or ())})
        if like is not None:
            given = {name for name in options if _is_given(context, name)}
            asked = asked_like(like, asked, given)
        run(to_job(asked))


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
