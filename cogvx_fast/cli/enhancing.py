"""`--enhance`: the prompts of a job rewritten before its weights are read."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from .console import UsageError, messages, say

if TYPE_CHECKING:
    from cogvx_fast.enhance import Endpoint, LocalModel, Pictures

    from .checkpoint import Checkpoint
    from .job import Job
    from .order import Asked

_OPTION, _LOCAL = "--enhance", "--enhance-local"


@dataclasses.dataclass(frozen=True)
class Enhancing:
    """Who rewrites prompts, and whether it is shown the pictures that the video is made from."""

    writer: Endpoint | LocalModel
    shows_pictures: bool


def check(asked: Asked, checkpoint: Checkpoint, device: str) -> Enhancing | None:
    """What `--enhance` and its options ask for; nothing is connected to or read.

    Raises:
        UsageError: for what cannot work, and for options without effect.
    """
    model, local = asked.enhance_model, asked.enhance_local
    if not asked.enhance:
        for name, value in (("--enhance-model", model), (_LOCAL, local)):
            if value is not None:
                raise UsageError(name, repr(value), "has no effect without --enhance; add it")
        if not asked.enhance_pictures:
            raise UsageError("--no-enhance-pictures", None, "has no effect without --enhance; add it")
        return None
    from cogvx_fast.demo import is_demo
    from cogvx_fast.enhance import Endpoint, LocalModel, RefusedError

    if is_demo(checkpoint.source):
        words = (
            "the demo checkpoint understands one kind of sentence only, such as 'a red circle moves right on a white"
        )
        raise UsageError(_OPTION, None, f"{words} background'; name another by --model, or leave --enhance out")
    if local is None:
        try:
            return Enhancing(Endpoint(model), asked.enhance_pictures)
        except RefusedError as error:
            raise UsageError(_OPTION, None, f"{error}; or name a model here by {_LOCAL}") from None
    if model is not None:
        raise UsageError("--enhance-model", repr(model), f"is of an address, {_LOCAL} runs here; leave one of them out")
    try:
        return Enhancing(LocalModel(local, device), asked.enhance_pictures)
    except RefusedError as error:
        raise UsageError(_LOCAL, repr(local), str(error)) from None


def applied(job: Job) -> Job:
    """`job` with its prompts rewritten, as far as somebody answers; each is said before anything is made of it.

    Raises:
        UsageError: where it cannot work as it is set up.
    """
    if job.enhancing is None:
        return job
    from cogvx_fast import enhance

    from . import loading

    writer = job.enhancing.writer
    pictures = _pictures(job) if job.enhancing.shows_pictures else None
    found: dict[str, str] = {}
    try:
        with loading.quiet_libraries():
            tokenizer = loading.load_tokenizer(job.checkpoint)
            for prompt in dict.fromkeys(job.prompts):
                with _asking(writer):
                    made = enhance.enhance(prompt, writer, tokenizer, job.text_length, pictures)
                for note in made.notes:
                    say(messages, f"note: {note}", style="yellow")
                say(messages, f"enhanced: {made.prompt!r}")
                found[prompt] = made.prompt
                if not made.saw_pictures:
                    pictures = None  # what was refused once is not tried for each prompt
    except enhance.UnansweredError as error:
        left = "the prompt stays" if len(set(job.prompts)) == 1 else "this prompt and those behind it stay"
        say(messages, f"warning: not enhanced: {error}; {left} as given", style="yellow")
    except enhance.RefusedError as error:
        if isinstance(writer, enhance.LocalModel):
            raise UsageError(_LOCAL, repr(writer.source), str(error)) from None
        raise UsageError(_OPTION, None, str(error)) from None
    finally:
        if isinstance(writer, enhance.LocalModel):
            writer.close()  # before the video's model needs the room
    return dataclasses.replace(
        job,
        prompts=[found.get(prompt, prompt) for prompt in job.prompts],
        originals=[prompt if prompt in found else None for prompt in job.prompts],
    )


def _pictures(job: Job) -> Pictures:
    """What the video is made from, as the pipeline gets it; poses and edges are no pictures of it."""
    from cogvx_fast.enhance import Pictures

    inputs: dict[str, Any] = job.inputs
    return Pictures(inputs.get("image"), inputs.get("last_image"), inputs.get("video") or ())


@contextlib.contextmanager
def _asking(writer: Endpoint | LocalModel) -> Iterator[None]:
    from cogvx_fast.enhance import LocalModel

    if isinstance(writer, LocalModel) and not Path(writer.source).is_dir():
        say(messages, f"loading {writer.source}")  # a download shows bars of its own, which a spinner would tear
        yield
        return
    where = writer.source if isinstance(writer, LocalModel) else writer.address
    with messages.status(Text(f"asking {where} for a longer prompt")):
        yield
