"""Prompts as CogVideoX was trained on: long, plain descriptions, which a language model writes from a short one.

    from cogvx_fast.enhance import Endpoint, enhance
    better = enhance("a panda plays a guitar", Endpoint("gpt-4o-mini"), tokenizer=pipe.tokenizer)
    frames = pipe(better.prompt).frames[0]

Nothing here is used unless it is asked for: an `Endpoint` sends the prompt, and pictures if there are some, to an
address; a `LocalModel` runs here.
"""

from __future__ import annotations

from .client import Endpoint
from .errors import EnhanceError, RefusedError, UnansweredError
from .local import LocalModel
from .prompts import Pictures
from .rewriting import Enhanced, Writer, enhance

__all__ = [
    "Endpoint",
    "EnhanceError",
    "Enhanced",
    "LocalModel",
    "Pictures",
    "RefusedError",
    "UnansweredError",
    "Writer",
    "enhance",
]
