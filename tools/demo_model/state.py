"""Training checkpoints: written under a temporary name, then renamed, so that none is ever half-written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_state(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_state(path: Path) -> dict[str, Any] | None:
    """The saved state, or None where there is none yet. Tensors and plain containers only."""
    return torch.load(path, weights_only=True) if path.exists() else None
