"""Asks for an enhanced prompt until there is one that CogVideoX takes whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cogvx_fast.family import TEXT_TOKENS

from . import answers, prompts
from .errors import EnhanceError, RefusedError, UnansweredError
from .prompts import Message, Pictures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRIES = 2  # for an answer that says something
# A server that takes no pictures says so by many numbers, 500 among them; these are about something else.
_NOT_OF_PICTURES = (401, 403, 408, 429)


class Writer(Protocol):
    """A language model: `Endpoint` or `LocalModel`.

    Attributes:
        sees: whether pictures can be shown to it; some servers tell only when asked.
    """

    sees: bool

    def write(self, messages: list[Message]) -> str:
        """What it answers; an `EnhanceError` if it does not."""
        ...


@dataclass(frozen=True)
class Enhanced:
    """A prompt and what became of it.

    Attributes:
        original, prompt: before and after.
        saw_pictures: whether pictures were shown to the model.
        notes: what was done beside asking, a line each.
    """

    original: str
    prompt: str
    saw_pictures: bool = False
    notes: tuple[str, ...] = ()


def enhance(
    prompt: str,
    writer: Writer,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int = TEXT_TOKENS,
    pictures: Pictures | None = None,
) -> Enhanced:
    """A prompt rewritten as the captions that CogVideoX was trained on.

    Args:
        writer: who writes it.
        tokenizer: of the checkpoint; with it the answer's tokens are counted. One that is too long is asked for again,
            shorter, and if need be cut at the end of a sentence. None: it is taken as it comes.
        max_tokens: that the checkpoint takes: 226, of CogVideoX 1.5 224; the end mark is one of them.
        pictures: that the description begins from. Where the model does not take them, it is asked without.

    Raises:
        UnansweredError: if nothing answers, or with nothing that can be used.
        RefusedError: if it cannot work: a wrong key, no such model.
    """
    notes: list[str] = []
    if pictures and not writer.sees:
        notes.append("the language model gets the text alone: it sees no pictures")
        pictures = None
    messages = prompts.request(prompt, max_tokens, pictures)
    try:
        answer = _answer(writer, messages)
    except EnhanceError as error:
        if not pictures or error.status is None or error.status in _NOT_OF_PICTURES:
            raise
        pictures = None
        messages = prompts.request(prompt, max_tokens)
        answer = _answer(writer, messages)  # if pictures were not the reason, this says what is
        notes.append(f"the language model takes no pictures and was asked without ({error})")

    def fits(text: str) -> bool:
        return tokenizer is None or len(tokenizer(text, verbose=False).input_ids) <= max_tokens

    if not fits(answer):
        answer = _shortened(writer, messages, answer, max_tokens, fits, notes)
    return Enhanced(prompt, answer, bool(pictures), tuple(notes))


def _answer(writer: Writer, messages: list[Message]) -> str:
    """An answer that says something, cleaned."""
    for _ in range(_TRIES):
        answer = answers.cleaned(writer.write(messages))
        if answer:
            return answer
    raise UnansweredError("the answer is empty")


def _shortened(
    writer: Writer,
    messages: list[Message],
    answer: str,
    max_tokens: int,
    fits: Callable[[str], bool],
    notes: list[str],
) -> str:
    try:
        again = answers.cleaned(writer.write(prompts.shorter(messages, answer, max_tokens)))
    except (RefusedError, UnansweredError):
        again = ""  # there is one that can be cut
    answer = again or answer
    if fits(answer):
        notes.append(f"the first answer had more than {max_tokens} tokens; this is a shorter one")
        return answer
    answer = answers.cut(answer, fits)
    if not answer:
        raise UnansweredError(f"no word of the answer fits into {max_tokens} tokens")
    notes.append(f"the answer had more than {max_tokens} tokens and was cut")
    return answer
