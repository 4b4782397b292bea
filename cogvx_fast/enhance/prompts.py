"""What a language model is told, and shown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, TypeAlias

from PIL import Image

# Of OpenAI's chat completions: {"role": ..., "content": a text, or a list of texts and pictures}.
Message: TypeAlias = dict[str, Any]

# Words to ask for, for each token that there is room for; one is about 0.7 words of English. Answers are counted.
_WANTED, _MOST, _SHORTER = 0.45, 0.6, 0.35
_SIDE = 512  # pixels of a picture's longer side: enough to say what is in it

# What the captions of its training are like: CogVideoX's paper (arXiv:2408.06072), and the examples in its repository.
# Dense descriptions of one continuous shot, in the order of time, about a hundred words long.
_SYSTEM = """\
You write captions for a text-to-video model. It learned from clips of a few seconds, each with a detailed and \
matter-of-fact caption, and what it makes is best when its input reads like one of those. Turn the user's request into \
one such caption.

- One paragraph of plain English, whatever the language of the request: about {wanted} words, never more than {most}.
- A single continuous shot of about six seconds, without cuts. Say who or what it shows and how that looks; what \
happens, in the order in which it happens; then the place, the light and the colours; and where the camera is and \
whether it moves.
- Keep all that the request says: numbers, colours, names, style, words to be read. Add details that suit it; change \
nothing.
- Only what can be seen, in the present tense. No sounds, no thoughts, no praise of the picture, no remarks about the \
request or about a video.
- A request that is detailed already keeps its details; bring it into this form.

Answer with the caption alone: no title, no list, no quotation marks, no markup."""

# One pair shows a small model the length and the tone better than rules do.
_EXAMPLE = (
    "an old man feeds pigeons",
    "An elderly man with a short white beard, a brown wool coat and a flat grey cap sits on a green wooden bench in a "
    "city park. He reaches into a paper bag, then slowly opens his hand and scatters crumbs over the gravel in front "
    "of his shoes. A dozen grey pigeons walk up to him, pecking at the ground, and one of them flutters up onto the "
    "bench beside him. He turns his head towards it and smiles. Yellow leaves lie on the path and bare trees stand "
    "behind the bench in soft, low morning light. The camera stays still at the height of his eyes, a few steps away.",
)

_SHOWN = {
    "image": "The picture is the first frame of the video. Begin with what is in it, as it is there, and go on with "
    "how it moves from there as the request says, seen from where the picture is seen.",
    "last_image": "The picture is the last frame of the video. Describe a shot that ends with what is in it, as it is "
    "there.",
    "both": "The two pictures are the first and the last frame of the video. Begin with what is in the first, go on "
    "with how it becomes the second, and end with that.",
    "video": "The pictures are frames of a video, in their order, which will be made anew as the request says. "
    "Describe the new video: the places and movements of the old one, and what the request changes.",
}


@dataclass(frozen=True)
class Pictures:
    """What a description begins from; all of them RGB images of any size.

    Attributes:
        image, last_image: the first and the last frame.
        video: frames of the video that is made anew, in order; a few are shown.
    """

    image: Image.Image | None = None
    last_image: Image.Image | None = None
    video: Sequence[Image.Image] = ()

    def __bool__(self) -> bool:
        return bool(self.shown)

    @property
    def shown(self) -> list[Image.Image]:
        """Those that go along: of a video the first, the middle and the last."""
        if self.video:
            last = len(self.video) - 1
            return [self.video[index] for index in sorted({0, last // 2, last})]
        return [picture for picture in (self.image, self.last_image) if picture is not None]

    @property
    def meaning(self) -> str:
        """What they are, for the language model."""
        if self.video:
            return _SHOWN["video"]
        if self.image is not None and self.last_image is not None:
            return _SHOWN["both"]
        return _SHOWN["image" if self.image is not None else "last_image"]


def request(prompt: str, max_tokens: int, pictures: Pictures | None = None) -> list[Message]:
    """The conversation that asks for an enhanced prompt.

    Args:
        max_tokens: of T5 that CogVideoX takes.
    """
    system = _SYSTEM.format(wanted=_words(max_tokens, _WANTED), most=_words(max_tokens, _MOST))
    if not pictures:
        asked, answer = _EXAMPLE
        example = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return [{"role": "system", "content": system}, *example, {"role": "user", "content": prompt}]
    urls = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures.shown]
    shown = [{"type": "text", "text": prompt}, *urls]
    return [{"role": "system", "content": f"{system}\n\n{pictures.meaning}"}, {"role": "user", "content": shown}]


def shorter(messages: list[Message], answer: str, max_tokens: int) -> list[Message]:
    """The conversation that asks for a shorter one than `answer`."""
    most = _words(max_tokens, _SHORTER)
    again = f"That is too long for the video model. Write the caption again in {most} words or fewer, complete."
    return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": again}]


def data_url(picture: Image.Image) -> str:
    """A picture as a `data:` address: a JPEG of at most `_SIDE` pixels a side."""
    small = picture.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    file = BytesIO()
    small.save(file, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _words(max_tokens: int, share: float) -> int:
    return max(3, round(max_tokens * share))
