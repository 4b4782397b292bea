"""Where the trained checkpoint that ships with the package lies."""

from __future__ import annotations

from pathlib import Path


def demo_checkpoint() -> str:
    """Path of a small trained CogVideoX in diffusers format: coloured shapes that move over plain backgrounds.

    Raises:
        FileNotFoundError: if the installed package lacks it.
    """
    folder = Path(__file__).parent / "assets" / "demo"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"the demo checkpoint is missing from this installation: {folder}")
    return str(folder)
