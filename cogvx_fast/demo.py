"""Where the trained checkpoints that ship with the package lie."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

Kind = Literal["text", "inpaint"]


def demo_checkpoint(kind: Kind = "text") -> str:
    """Path of a small trained CogVideoX in diffusers format: coloured shapes that move over plain backgrounds.

    Args:
        kind: "text": one of CogVideoX-2b's form, for text and videos. "inpaint": one of CogVideoX-Fun InP's, for the
            first frame, the last, both or neither, and text.

    Raises:
        ValueError: for another kind.
        FileNotFoundError: if the installed package lacks it.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} must be one of {', '.join(map(repr, get_args(Kind)))}")
    folder = Path(__file__).parent / "assets" / ("demo" if kind == "text" else f"demo-{kind}")
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"the demo checkpoint is missing from this installation: {folder}")
    return str(folder)


def is_demo(source: str) -> bool:
    """Whether a folder is one of `demo_checkpoint`."""
    assets = Path(__file__).parent / "assets"
    return Path(source).resolve() in {(assets / name).resolve() for name in ("demo", "demo-inpaint")}
