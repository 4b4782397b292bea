"""Where the trained checkpoints that ship with the package lie."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Kind = Literal["text", "inpaint"]
_ASSETS = Path(__file__).parent / "assets"
_FOLDERS: dict[str, Path] = {"text": _ASSETS / "demo", "inpaint": _ASSETS / "demo-inpaint"}


def demo_checkpoint(kind: Kind = "text") -> str:
    """Path of a small trained CogVideoX in diffusers format: coloured shapes that move over plain backgrounds.

    Args:
        kind: "text": one of CogVideoX-2b's form, for text and videos, 17 frames of 128x128. "inpaint": one of
            CogVideoX-Fun InP's, for the first frame, the last, both or neither, and text, 17 frames of 128x128.

    Raises:
        ValueError: for another kind.
        FileNotFoundError: if the installed package lacks it.
    """
    folder = _FOLDERS.get(kind)
    if folder is None:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(map(repr, _FOLDERS))}")
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"the demo checkpoint is missing from this installation: {folder}")
    return str(folder)


def is_demo(source: str) -> bool:
    """Whether a folder is one of `demo_checkpoint`."""
    return Path(source).resolve() in {folder.resolve() for folder in _FOLDERS.values()}
