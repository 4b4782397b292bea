"""Checks of the arguments of `cogvx-fast generate`: pure functions on values and configurations, without torch."""

from __future__ import annotations

import os
from pathlib import Path

from cogvx_fast.family import Variant
from cogvx_fast.video import check_name, check_output, check_sheet, max_fps

from .checkpoint import ARGUMENT as MODEL
from .checkpoint import Checkpoint
from .console import UsageError

MAX_GUIDANCE = 30.0
MAX_SEED = 2**63 - 1
MAX_ZOOM = 16


def read_prompts(prompt: str | None, prompt_file: Path | None) -> list[str]:
    """The prompts to make videos of: `prompt`, or the lines of `prompt_file` that are not blank.

    Raises:
        UsageError: unless exactly one of both is given and it holds a prompt, in UTF-8.
    """
    if prompt is not None and prompt_file is not None:
        raise UsageError("--prompt-file", repr(str(prompt_file)), "give either PROMPT or --prompt-file, not both")
    if prompt_file is None:
        if prompt is None:
            raise UsageError("PROMPT", None, "is missing; give a text or --prompt-file")
        prompt = as_text("PROMPT", prompt)
        if not _says_something(prompt):
            raise UsageError("PROMPT", repr(prompt), "is empty; must say what the video shows")
        return [prompt]
    try:
        # Some editors begin a file with a byte-order mark, which is none of the first prompt.
        lines = prompt_file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(
            "--prompt-file", repr(str(prompt_file)), f"cannot be read ({error.strerror}); must be a text file"
        ) from None
    except UnicodeDecodeError:
        raise UsageError("--prompt-file", repr(str(prompt_file)), "is not text in UTF-8") from None
    prompts = [line.strip() for line in lines if _says_something(line)]
    if not prompts:
        raise UsageError("--prompt-file", repr(str(prompt_file)), "is empty; must have one prompt a line")
    return prompts


def as_text(argument: str, value: str) -> str:
    """What the command line says in UTF-8, whatever the locale's encoding is.

    Raises:
        UsageError: for bytes that are no UTF-8, which tokenizers do not read.
    """
    try:
        return value.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise UsageError(argument, repr(value), "is not text in UTF-8") from None


def _says_something(text: str) -> bool:
    """Whether there is more in it than spaces and what nobody sees."""
    return any(character.isprintable() and not character.isspace() for character in text)


def check_numbers(
    steps: int, guidance: float, negative: str | None, seed: int, zoom: int, checkpoint: Checkpoint
) -> None:
    """Raise a `UsageError` for a number out of range, or a negative prompt that would have no effect."""
    if not 1 <= steps <= checkpoint.num_train_timesteps:
        raise UsageError("--steps", steps, f"must be 1 to {checkpoint.num_train_timesteps}")
    if not 1.0 <= guidance <= MAX_GUIDANCE:  # written so that NaN fails
        raise UsageError("--guidance", guidance, f"must be 1 (no guidance) to {MAX_GUIDANCE:g}")
    if negative and guidance == 1.0:
        raise UsageError(
            "--negative", repr(negative), "has no effect with --guidance 1; raise the guidance or leave it out"
        )
    if not 0 <= seed <= MAX_SEED:
        raise UsageError("--seed", seed, f"must be 0 to {MAX_SEED}")
    if not 1 <= zoom <= MAX_ZOOM:
        raise UsageError("--zoom", zoom, f"must be 1 to {MAX_ZOOM}")


def output_paths(output: Path, num_prompts: int) -> list[Path]:
    """`output` itself for one prompt, else `out-1.mp4`, `out-2.mp4`, … with as many digits as the last number has.

    Raises:
        UsageError: if `output` has no name to write to, or to number.
    """
    try:
        check_name(output)
    except ValueError as error:
        raise UsageError("--output", None, str(error)) from None
    if num_prompts == 1:
        return [output]
    digits = len(str(num_prompts))
    return [
        output.with_name(f"{output.stem}-{number:0{digits}d}{output.suffix}") for number in range(1, num_prompts + 1)
    ]


def check_places(outputs: list[Path], sheet: Path | None, fps: int | None) -> None:
    """Raise a `UsageError` for a place where a video or the sheet could not be written, or a rate that does not fit."""
    try:
        for path in outputs:
            check_output(path)
    except ValueError as error:
        raise UsageError("--output", None, str(error)) from None
    if fps is not None and not outputs[0].suffix:
        raise UsageError("--fps", fps, f"has no effect on a folder of frames ({str(outputs[0])!r}); leave it out")
    limit = max_fps(outputs[0])
    if fps is not None and not 1 <= fps <= limit:
        raise UsageError("--fps", fps, f"must be 1 to {limit} for {str(outputs[0])!r}")
    if sheet is None:
        return
    try:
        check_sheet(sheet)
    except ValueError as error:
        raise UsageError("--sheet", None, str(error)) from None
    for path in outputs:
        for lower, upper in ((sheet, path), (path, sheet)):
            if upper.suffix and _real(upper) in _real(lower).parents:
                raise UsageError("--sheet", repr(str(sheet)), f"{str(lower)!r} would lie in {str(upper)!r}, a file")


def check_preview(path: Path | None, others: list[Path]) -> None:
    """Raise a `UsageError` for a preview that could not be written, or would be in the way of `others`."""
    if path is None:
        return
    suffix = path.suffix.lower()
    if suffix not in (".png", ".gif", ".webp"):
        raise UsageError("--preview", repr(str(path)), "must end in .png, .gif or .webp")
    try:
        (check_sheet if suffix == ".png" else check_output)(path)
    except ValueError as error:
        raise UsageError("--preview", None, str(error)) from None
    if os.path.lexists(path):
        raise UsageError(
            "--preview", repr(str(path)), "is there already, and would be removed at the end; name a new file"
        )
    for other in others:
        if _real(other) == _real(path) or _real(other) in _real(path).parents or _real(path) in _real(other).parents:
            raise UsageError("--preview", repr(str(path)), f"is in the way of {str(other)!r}; name another file")


def _real(path: Path) -> Path:
    """Where `path` will be: through the links of its folders, not through one that it replaces."""
    return path.parent.resolve() / path.name


def check_text_only(checkpoint: Checkpoint) -> None:
    """Raise a `UsageError` for a checkpoint that needs an image or a control video besides the text."""
    variant = checkpoint.variant
    if variant.in_channels == variant.out_channels:
        return
    kind = "FunControl" if "FunControl" in checkpoint.pipeline_class else "ImageToVideo"
    raise UsageError(
        MODEL,
        repr(checkpoint.source),
        f"is a checkpoint for {checkpoint.pipeline_class} (in_channels {variant.in_channels}); this command makes "
        f"videos from text alone. From Python: cogvx_fast.FastCogVideoX{kind}Pipeline",
    )


def video_size(height: int | None, width: int | None, variant: Variant) -> tuple[int, int]:
    """(height, width) in pixels: what was asked for, else the checkpoint's own.

    Raises:
        UsageError: if the checkpoint cannot make that size.
    """
    own = variant.default_size
    limits: tuple[int | None, int | None] = variant.largest_size or (None, None)
    size = []
    for argument, value, default, limit in zip(("--height", "--width"), (height, width), own, limits, strict=True):
        value = default if value is None else value
        if variant.use_learned_positional_embeddings and value != default:
            raise UsageError(argument, value, f"must be {default}: the positions of this checkpoint are learned")
        _check_side(argument, value, variant.pixels_per_token, limit)
        size.append(value)
    return size[0], size[1]


def _check_side(argument: str, value: int, multiple: int, limit: int | None) -> None:
    if limit is not None and value > limit:
        raise UsageError(argument, value, f"must be at most {limit} for this checkpoint")
    if value < multiple or value % multiple:
        below, above = value // multiple * multiple, (value // multiple + 1) * multiple
        near = f"{multiple}" if value < multiple else f"{below} or {above}"
        raise UsageError(argument, value, f"must be a multiple of {multiple}; nearest: {near}")


def too_large(
    frames: int | None,
    height: int | None,
    width: int | None,
    checkpoint: Checkpoint,
    why: Exception,
    model: str = MODEL,
) -> UsageError:
    """The error of a size that memory does not hold: of the number that is most beyond the checkpoint's own, or where
    none was given, of the argument `model`."""
    variant = checkpoint.variant
    own = {"--frames": variant.sample_frames, **dict(zip(("--height", "--width"), variant.default_size, strict=True))}
    given = {"--frames": frames, "--height": height, "--width": width}
    times = {name: value // own[name] for name, value in given.items() if value is not None}
    if not times:
        return UsageError(model, repr(checkpoint.source), str(why))
    name = max(times, key=times.__getitem__)
    return UsageError(name, given[name], str(why))


def num_frames(frames: int | None, variant: Variant) -> int:
    """How many frames to make: what was asked for, else the checkpoint's own number, which is always allowed.

    Raises:
        UsageError: for a number that the autoencoder does not decode, or the model was not trained on; names the
            nearest ones.
    """
    own, period = variant.sample_frames, variant.frame_period
    if frames is None or frames == own:
        return own
    if variant.use_learned_positional_embeddings:
        raise UsageError("--frames", frames, f"must be {own}: the positions of this checkpoint are learned")
    if frames < 1 or (frames - 1) % period:
        below = max(0, (frames - 1) // period) * period + 1
        near = f"{below}" if frames < below else f"{below} or {below + period}"
        raise UsageError("--frames", frames, f"must be {period}N+1 for this checkpoint; nearest: {near}")
    return frames


def model_or_demo(model: str | None, of_pictures: bool = False) -> str:
    """`model`, else the path of the demo checkpoint: of the second one for a first or a last picture.

    Raises:
        UsageError: if there is neither.
    """
    if model is not None:
        return model
    from cogvx_fast import demo_checkpoint

    try:
        return demo_checkpoint("inpaint" if of_pictures else "text")
    except FileNotFoundError as error:
        raise UsageError(MODEL, None, f"{error}; name a folder or a Hub id") from None
