"""From what a language model answers to a prompt: markup off, and no longer than CogVideoX takes."""

from __future__ import annotations

import re
from collections.abc import Callable

_LONGEST = 200_000  # characters that are looked at: a model that does not stop must not stop us
# What models that reason say before they answer; of one that was cut off there is no end.
_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"```[^\n`]*\n?")
_HEADING = re.compile(r"^\s*#{1,6}\s.*$", re.MULTILINE)
_LINE_MARKS = re.compile(r"^\s*(?:#{1,6}\s+|>\s+|[-*+•]\s+|\d{1,2}[.)]\s+)", re.MULTILINE)
_EMPHASIS = re.compile(r"(\*\*|__|\*|`)(?=\S)(.+?)(?<=\S)\1")
# "Here is the caption:", "Caption:", "Sure! Enhanced prompt:" - a label, and no sentence of the caption.
_NOUN = r"(?:prompt|caption|description|version)"
_LABEL = re.compile(
    r"^(?:sure|certainly|of course|okay)?[\s,.!]*"
    rf"(?:here you go|here(?:['\u2019]s| is| are)\b[^.:]{{0,60}}\b{_NOUN}\b[^.:]{{0,40}}"
    rf"|(?:the |an? )?(?:enhanced |video |detailed |new )*{_NOUN})\s*:\s*",
    re.IGNORECASE,
)
_COUNT = re.compile(r"\s*(?:[(\[](?:word count:?\s*)?\d+ words[)\]]|word count:?\s*\d+)\.?$", re.IGNORECASE)
_QUOTES = {'"': '"', "'": "'", "“": "”", "„": "“", "\u2018": "\u2019", "«": "»", "「": "」"}
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”\u2019)]*(?=\s|$)|[。\uff01\uff1f]")


def cleaned(answer: str) -> str:
    """The caption in an answer as one line of text: without thoughts, labels, markup and quotation marks around it.

    Returns:
        "", where nothing is left.
    """
    text = answer[:_LONGEST].encode("utf-8", "ignore").decode("utf-8")  # a JSON text may hold halves of characters
    text = _THINKING.sub(" ", text)
    text = _FENCE.sub("\n", text)
    text = _HEADING.sub("", text) if _HEADING.sub("", text).strip() else text
    text = _LINE_MARKS.sub("", text)
    text = _EMPHASIS.sub(r"\2", text)
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    before = None
    while text != before:  # a label before a quotation, quotation marks around a label
        before, text = text, _unquoted(_COUNT.sub("", _LABEL.sub("", text))).strip()
    return text


def _unquoted(text: str) -> str:
    """Without a pair of quotation marks around all of it; two quotations with words between them are no such pair."""
    closing = _QUOTES.get(text[:1])
    inside = text[1:-1]
    if len(text) < 2 or closing is None or text[-1] != closing or (text[0] in inside and text[0] != "'"):
        return text
    return inside


def cut(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning of `text` that fits and ends as a sentence does; if no sentence fits, as many words as do.

    Args:
        fits: whether a text is short enough; of a text that is, so are its beginnings.
    """
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    words = [found.end() for found in re.finditer(r"\S+", text)]
    for places in (ends, words):
        low, high = 0, len(places)  # so many of the places are known to fit, so many may
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(text[: places[middle - 1]]) else (low, middle - 1)
        if low:
            return text[: places[low - 1]]
    return ""
