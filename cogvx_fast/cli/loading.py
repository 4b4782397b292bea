"""From the name of a model to a pipeline on a device: device and precision, tokenizer, weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cogvx_fast import machine

from .checkpoint import ARGUMENT as MODEL
from .checkpoint import Checkpoint, refused
from .console import OutputError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cogvx_fast import EngineConfig, FastCogVideoXPipeline


def choose_device(device: str | None) -> str:
    """`device` if this machine has it; without one the best there is: CUDA, then Apple's, then the CPU.

    Raises:
        UsageError: if there is no such device; names those there are.
    """
    import torch

    available = {f"cuda:{index}": torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        available["mps"] = "Apple GPU"
    available["cpu"] = f"{torch.get_num_threads()} threads"
    if device is None:
        return next(iter(available))
    if device in available or (device == "cuda" and "cuda:0" in available):
        return device
    there = ", ".join(f"{name} ({what})" for name, what in available.items())
    raise UsageError("--device", repr(device), f"is not there; available: {there}")


def choose_dtype(dtype: str | None, device: str, checkpoint: Checkpoint) -> str:
    """`dtype`, else what the checkpoint was quantized in, else its own; on a CPU bfloat16 if it has units for it, or
    float32."""
    if dtype is not None or checkpoint.dtype is not None:
        return dtype or str(checkpoint.dtype)
    if device == "cpu":
        return machine.cpu_dtype()
    return checkpoint.native_dtype


def choose_engine(
    engine: str | None,
    memory_limit: str | None,
    checkpoint: Checkpoint,
    speed: str | None = None,
    schedule: str | None = None,
) -> EngineConfig:
    """The engine called `engine`, with a memory limit the one that it leaves open; without either that of `checkpoint`,
    balanced if it is quantized.

    Args:
        speed, schedule: of engine "turbo".

    Raises:
        UsageError: for an engine that does not exist or cannot work, and for what is no size.
    """
    from cogvx_fast import EngineConfig

    try:
        named = EngineConfig.from_name(engine or ("exact" if checkpoint.recipe is None else "balanced"))
    except ValueError as error:
        raise UsageError("--engine", repr(engine), str(error)) from None
    given: dict[str, Any] = {"speed": _as_number(speed), "schedule": schedule}
    for field, value in given.items():
        if value is not None:
            try:
                named = dataclasses.replace(named, **{field: value})
            except ValueError as error:
                raise UsageError(f"--{field}", repr(value), str(error)) from None
    if memory_limit is None:
        return named
    try:
        if engine is None:
            return EngineConfig(memory_limit=memory_limit)
        return EngineConfig(named.tier, memory_limit=memory_limit, speed=named.speed, schedule=named.schedule)
    except ValueError as error:
        raise UsageError("--memory-limit", repr(memory_limit), str(error)) from None


def check_schedule(engine: EngineConfig, checkpoint: Checkpoint, steps: int) -> None:
    """Raise a `UsageError` where engine "turbo" has no schedule for the checkpoint, or none of so few steps."""
    if not engine.skips_steps:
        return
    from dataclasses import asdict

    from cogvx_fast.turbo import ScheduleError, choice, schedule

    try:
        reason = choice.why_not(engine.schedule_path, asdict(checkpoint.variant))
    except ScheduleError as error:
        reason = str(error)
    if reason:
        argument = ("--schedule", repr(engine.schedule)) if engine.schedule is not None else ("--engine", "'turbo'")
        raise UsageError(*argument, reason)
    try:
        schedule.evaluations_of(engine.speed, steps)
    except ScheduleError as error:
        raise UsageError("--steps", steps, str(error)) from None


def _as_number(speed: str | None) -> float | str | None:
    try:
        return None if speed is None else float(speed)
    except ValueError:
        return speed


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer alone, which is small: so that a prompt that is too long is seen before the weights are read."""
    import transformers

    from cogvx_fast.checkpoint.check import check_tokenizer

    tokenizer_class = getattr(transformers, checkpoint.tokenizer_class, None)
    if tokenizer_class is None:
        raise UsageError(
            MODEL, repr(checkpoint.source), f"its tokenizer is a {checkpoint.tokenizer_class}, unknown here"
        )
    with loading_errors(checkpoint):
        tokenizer = tokenizer_class.from_pretrained(checkpoint.source, subfolder="tokenizer")
        check_tokenizer(tokenizer, checkpoint.source)
        return tokenizer


def cut_text(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> str:
    """The end of `text` that does not fit into `max_length` tokens, one of which is the end mark; "" if all fits."""
    tokens = tokenizer(text).input_ids
    return "" if len(tokens) <= max_length else str(tokenizer.decode(tokens[max_length - 1 : -1]))


def load_pipeline(
    checkpoint: Checkpoint,
    dtype: str,
    device: str,
    engine: EngineConfig,
    scheduler: str | None,
    pipeline: str = "FastCogVideoXPipeline",
    offload: str | None = None,
    reads_text: bool = True,
) -> FastCogVideoXPipeline:
    """The fast pipeline of `checkpoint`, on `device`; `scheduler` ("ddim" or "dpm") replaces the checkpoint's own, and
    `pipeline` is the name of its class.

    Args:
        offload: "model" or "sequential", as diffusers has them: what runs comes to the device, and goes again.
        reads_text: False for one of several processes that is told the prompt's embeddings: without a text encoder.
    """
    import torch

    import cogvx_fast

    with loading_errors(checkpoint):
        source, torch_dtype = checkpoint.source, getattr(torch, dtype)
        parts = {} if reads_text else {"text_encoder": None}
        pipe: Any = getattr(cogvx_fast, pipeline).from_pretrained(source, dtype=torch_dtype, engine=engine, **parts)
    if scheduler is not None:
        pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    if offload is None:
        return pipe.to(device)
    enable = {"model": pipe.enable_model_cpu_offload, "sequential": pipe.enable_sequential_cpu_offload}[offload]
    enable(device=device)
    return pipe


def make_scheduler(kind: str, own: Any) -> Any:
    """A scheduler of `kind` ("ddim" or "dpm") for the checkpoint whose `own` is given."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    scheduler_class = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}[kind]
    # All published checkpoints are used with this spacing, though not all of their configurations say so.
    return scheduler_class.from_config(own.config, timestep_spacing="trailing")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block diffusers and transformers show no bars and no warnings: the command has its own."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, has_bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if has_bars:
                library.enable_progress_bar()


@contextlib.contextmanager
def loading_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Whatever a library dies of while it reads files is wrong with the files, or with what may be had."""
    from cogvx_fast.devices import is_out_of_memory

    try:
        with refused(checkpoint.source):
            yield
    except UsageError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise UsageError(MODEL, repr(checkpoint.source), f"cannot be loaded ({reason})") from error


@contextlib.contextmanager
def within_memory(device: str, num_frames: int, height: int, width: int) -> Iterator[None]:
    """Within the block, where a video of this size is made, a want of memory is said in a line."""
    from cogvx_fast.devices import is_out_of_memory

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size, reason = f"{num_frames} frames of {width}x{height}", " ".join(str(error).split())
        raise OutputError(
            f"{device} ran out of memory at {size}; lower --frames, --height or --width ({reason})"
        ) from error
