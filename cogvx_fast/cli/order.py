"""From the options of `cogvx-fast generate` to a checked `Job`: what can be refused for less comes first."""

from __future__ import annotations

import dataclasses
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import enhancing, inputs, lora, tasks, terminal_preview, together, validate
from .checkpoint import Checkpoint, read_checkpoint
from .console import UsageError, messages, say
from .job import Job

if TYPE_CHECKING:
    from cogvx_fast import EngineConfig
    from cogvx_fast.pictures import Fit

MOST_VIDEOS = 1000
DEFAULT_STRENGTH = 0.8  # diffusers'


@dataclass(frozen=True)
class Asked:
    """The options of the command, by their names there; None: not given.

    Attributes:
        original_prompt: no option: what `prompt` was before it was enhanced, in a video that `--like` names.
    """

    prompt: str | None = None
    output: Path = Path("out.mp4")
    prompt_file: Path | None = None
    enhance: bool = False
    enhance_model: str | None = None
    enhance_local: str | None = None
    enhance_pictures: bool = True
    original_prompt: str | None = None
    model: str | None = None
    image: Path | None = None
    last_image: Path | None = None
    video: Path | None = None
    strength: float | None = None
    control_video: Path | None = None
    fit: str = "crop"
    lora: tuple[str, ...] = ()
    steps: int = 50
    guidance: float = 6.0
    dynamic_guidance: bool = False
    negative: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    seed: str = "0"
    num_videos: int = 1
    fps: int | None = None
    zoom: int = 1
    max_sequence_length: int | None = None
    engine: str | None = None
    speed: str | None = None
    schedule: str | None = None
    recipe: str | None = None
    attention: str | None = None
    compile: str | None = None
    vae_memory: str | None = None
    memory_limit: str | None = None
    offload: str | None = None
    parallel: str | None = None
    dtype: str | None = None
    device: str | None = None
    scheduler: str | None = None
    sheet: Path | None = None
    preview: Path | None = None
    terminal_preview: str = "auto"
    metadata: bool = True

    @property
    def given(self) -> dict[str, Path | None]:
        """The pictures and videos."""
        return {
            "--image": self.image,
            "--last-image": self.last_image,
            "--video": self.video,
            "--control-video": self.control_video,
        }


def to_job(asked: Asked) -> Job:
    """A job that can be carried out.

    Raises:
        UsageError: for anything that cannot work, before a weight is read.
    """
    from cogvx_fast.pictures import Fit
    from cogvx_fast.video import holds_all_frames

    from . import loading
    from .prediction import fitted, request_of, room_error

    original = None if asked.original_prompt is None else validate.as_text("--like", asked.original_prompt)
    given = original if asked.enhance and original is not None else asked.prompt
    prompts = validate.read_prompts(given, asked.prompt_file)
    negative = None if asked.negative is None else validate.as_text("--negative", asked.negative)
    seed = _seed(asked.seed)
    if not 1 <= asked.num_videos <= MOST_VIDEOS:
        raise UsageError("--num-videos", asked.num_videos, f"must be 1 to {MOST_VIDEOS}")
    outputs = validate.output_paths(asked.output, len(prompts) * asked.num_videos)
    if together.company().is_first:  # who alone writes; others may be on other machines
        validate.check_places(outputs, asked.sheet, asked.fps)
        validate.check_preview(asked.preview, [*outputs, *([] if asked.sheet is None else [asked.sheet])])
    graphics = terminal_preview.choose(asked.terminal_preview)
    loras = list(map(lora.parse, asked.lora))
    of_pictures = any(asked.given[name] is not None for name in ("--image", "--last-image"))
    checkpoint = read_checkpoint(validate.model_or_demo(asked.model, of_pictures))
    task = tasks.choose(checkpoint, asked.given)
    validate.check_numbers(asked.steps, asked.guidance, negative, seed, asked.zoom, checkpoint)
    if asked.dynamic_guidance and asked.guidance == 1.0:
        raise UsageError("--dynamic-guidance", None, "has no effect with --guidance 1; raise the guidance")
    strength = _strength(asked, task)
    length = _text_length(asked, checkpoint)
    fit = Fit(asked.fit)
    found = inputs.read(asked.given, asked.frames or checkpoint.variant.sample_frames)
    height, width = _size(asked, checkpoint, found)
    num_frames = _num_frames(asked, checkpoint, task, found)
    config = _engine(asked, checkpoint)
    loading.check_schedule(config, checkpoint, asked.steps)
    device = loading.choose_device(together.device_of(asked.device))
    if asked.offload is not None and device == "cpu":
        raise UsageError("--offload", repr(asked.offload), "has no effect on a CPU, where models are already")
    dtype = loading.choose_dtype(asked.dtype, device, checkpoint)
    rewriting = enhancing.check(asked, checkpoint, device)
    size = request_of(checkpoint, height, width, num_frames, task.pipeline)
    request = dataclasses.replace(size, steps=asked.steps, guided=asked.guidance > 1, streams=True, text_tokens=length)
    keeps = len(outputs) if asked.sheet is not None else int(holds_all_frames(outputs[0]))
    kept = 3 * asked.zoom**2 * keeps if device == "cpu" else 0
    too_much = room_error(checkpoint, request, dtype, device, config, kept)
    if too_much is not None:
        raise validate.too_large(asked.frames, asked.height, asked.width, checkpoint, too_much)
    if config.memory_limit is not None:
        config = fitted(checkpoint, request, dtype, device, config)
    said = inputs.note(found, height, width, num_frames, fit, asked.given)
    if said:
        say(messages, f"note: {said}", style="yellow")
    seeds = range(seed, seed + asked.num_videos)
    return Job(
        prompts=[prompt for prompt in prompts for _ in seeds],
        originals=[None if asked.enhance else original for _ in outputs],
        enhancing=rewriting,
        outputs=outputs,
        sheet=asked.sheet,
        preview=asked.preview,
        graphics=graphics,
        checkpoint=checkpoint,
        task=task,
        inputs=_arguments(found, task, height, width, num_frames, fit, strength),
        loras=loras,
        height=height,
        width=width,
        num_frames=num_frames,
        steps=asked.steps,
        made_steps=asked.steps if strength is None else int(asked.steps * strength),
        guidance=asked.guidance,
        dynamic_guidance=asked.dynamic_guidance,
        negative=negative,
        text_length=length,
        seeds=[seed for _ in prompts for seed in seeds],
        fps=asked.fps or checkpoint.variant.default_fps,
        zoom=asked.zoom,
        engine=config,
        offload=asked.offload,
        dtype=dtype,
        device=device,
        scheduler=asked.scheduler,
        settings=_settings(asked) if asked.metadata else None,
        says_seed=asked.seed == "random",
    )


def _seed(text: str) -> int:
    if text == "random":
        return together.as_the_first(secrets.randbelow(2**31))
    try:
        seed = int(text)
    except ValueError:
        raise UsageError("--seed", repr(text), f"must be 0 to {validate.MAX_SEED}, or random") from None
    if not 0 <= seed <= validate.MAX_SEED:
        raise UsageError("--seed", text[:40], f"must be 0 to {validate.MAX_SEED}, or random")
    return seed


def _strength(asked: Asked, task: tasks.Task) -> float | None:
    """How much of a video is made anew; None: there is none."""
    if task is not tasks.VIDEO:
        if asked.strength is not None:
            raise UsageError("--strength", asked.strength, "has no effect without --video; leave it out")
        return None
    strength = DEFAULT_STRENGTH if asked.strength is None else asked.strength
    if not 0 < strength <= 1 or int(asked.steps * strength) < 1:
        least = f"{1 / asked.steps:.2g}"
        raise UsageError("--strength", strength, f"must be {least} to 1 for {asked.steps} steps")
    return strength


def _text_length(asked: Asked, checkpoint: Checkpoint) -> int:
    """Tokens that a prompt is padded to."""
    variant, length = checkpoint.variant, asked.max_sequence_length
    most = variant.max_text_seq_length
    if length is None:
        return most
    if variant.adds_positions and length != most:
        raise UsageError(
            "--max-sequence-length", length, f"must be {most}: the positions of this checkpoint are for it"
        )
    if not 1 <= length <= most:
        raise UsageError("--max-sequence-length", length, f"must be 1 to {most} for this checkpoint")
    return length


def _size(asked: Asked, checkpoint: Checkpoint, found: inputs.Inputs) -> tuple[int, int]:
    """Height and width: what was asked for; else the picture's shape, where the checkpoint makes any; else its own."""
    variant, shape = checkpoint.variant, found.shape
    if asked.height is None and asked.width is None and shape is not None and inputs.makes_any_size(variant):
        return inputs.size_like(shape, variant)
    return validate.video_size(asked.height, asked.width, variant)


def _num_frames(asked: Asked, checkpoint: Checkpoint, task: tasks.Task, found: inputs.Inputs) -> int:
    """What was asked for; else the checkpoint's own number, or as many as a shorter video has."""
    variant, length = checkpoint.variant, found.length
    if task is tasks.INPAINT and variant.patch_size_t is not None:
        return _paired_frames(asked.frames, variant.sample_frames)
    if length is None:
        return validate.num_frames(asked.frames, variant)
    name = "--video" if "--video" in found.pictures else "--control-video"
    period = variant.frame_period
    if asked.frames is None and length < variant.sample_frames:
        if length < period + 1:
            raise UsageError(name, repr(str(asked.given[name])), f"has {length} frames; must have {period + 1} or more")
        return (length - 1) // period * period + 1
    num_frames = validate.num_frames(asked.frames, variant)
    if length < num_frames:
        raise UsageError("--frames", num_frames, f"is more than {asked.given[name]} has: {length}")
    return num_frames


def _paired_frames(frames: int | None, own: int) -> int:
    """Of a checkpoint that joins latent frames in pairs and does not pad them."""
    frames = own if frames is None else frames
    if frames < 5 or (frames - 5) % 8:
        below = max(0, (frames - 5) // 8) * 8 + 5
        raise UsageError("--frames", frames, f"must be 8N+5 for this checkpoint; nearest: {below} or {below + 8}")
    return frames


def _engine(asked: Asked, checkpoint: Checkpoint) -> EngineConfig:
    from . import loading

    engine = asked.engine
    if engine is None and asked.recipe is not None:
        engine = "balanced"
    config = loading.choose_engine(engine, asked.memory_limit, checkpoint, asked.speed, asked.schedule)
    given: dict[str, Any] = {"recipe": asked.recipe, "attention": asked.attention, "compile": asked.compile}
    heads = checkpoint.variant.num_attention_heads
    given |= {"vae_memory": asked.vae_memory, "parallel": together.degrees(asked.parallel, heads)}
    for name, value in given.items():
        if value is not None:
            try:
                config = dataclasses.replace(config, **{name: value})
            except ValueError as error:
                raise UsageError(f"--{name.replace('_', '-')}", repr(value), str(error)) from None
    return config


def _arguments(
    found: inputs.Inputs,
    task: tasks.Task,
    height: int,
    width: int,
    num_frames: int,
    fit: Fit,
    strength: float | None,
) -> dict[str, Any]:
    made = inputs.arguments(found, task, height, width, num_frames, fit)
    if strength is not None:
        made["strength"] = strength
    if task.takes_frames:
        made["num_frames"] = num_frames
    return made


def _settings(asked: Asked) -> dict[str, Any]:
    """What a video keeps of how it was asked for, but what is its own: prompt and seed."""
    defaults, kept = Asked(), {}
    for field in dataclasses.fields(Asked):
        value = getattr(asked, field.name)
        if field.name not in _OF_THE_RUN and value != getattr(defaults, field.name):
            kept[field.name] = str(value.absolute()) if isinstance(value, Path) else value
    if asked.model is not None and os.path.isdir(asked.model):
        kept["model"] = os.path.abspath(asked.model)
    return kept


# Of one run, and not of the video.
_OF_THE_RUN = (
    *("prompt", "prompt_file", "output", "seed", "num_videos", "sheet", "preview", "terminal_preview", "metadata"),
    *("device", "parallel", "enhance", "enhance_model", "enhance_local", "enhance_pictures", "original_prompt"),
)
