"""What processes send each other, as functions of tensors that `torch.compile` takes into its graph.

Pieces may differ in size: nothing is padded where it could be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives as functional

from .ranks import Axis

_all_to_all: Any = functional.all_to_all_single  # whose type of a group's name torch keeps to itself
# torch 2.13 has renamed it.
_all_gather: Any = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor


def all_to_all(rows: torch.Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> torch.Tensor:
    """Rows for each process of `axis`, in its order, exchanged for theirs for this one.

    Args:
        rows: `(sum(sent), ...)`, contiguous.
        sent, received: how many rows go to each, and come of each.

    Returns:
        `(sum(received), ...)`.
    """
    return wait(_all_to_all(rows, list(received), list(sent), axis.group))


def gathered(piece: torch.Tensor, dim: int, sizes: Sequence[int], axis: Axis) -> torch.Tensor:
    """The pieces of all processes of `axis`, one behind the other in `dim`.

    Args:
        sizes: of each piece in `dim`.
    """
    if axis.size == 1:
        return piece
    longest = max(sizes)
    rows = piece.movedim(dim, 0).contiguous()
    if len(rows) < longest:
        rows = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    everybody = wait(_all_gather(rows, 0, axis.group))
    if min(sizes) == longest:
        return everybody.movedim(0, dim)
    return torch.cat([part[:size] for part, size in zip(everybody.split(longest), sizes, strict=True)]).movedim(0, dim)


def to_next(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """`(1, ...)`: what the process before this one in the ring of `axis` has given; all tensors are of one shape.

    It is under way until `wait` is called with it: what is computed before that does not wait.
    """
    following, before = ((axis.index + step) % axis.size for step in (1, -1))
    sent, received = ([int(other == one) for other in range(axis.size)] for one in (following, before))
    arriving: torch.Tensor = _all_to_all(tensor.flatten().view(1, *tensor.shape), received, sent, axis.group)
    return arriving


def wait(tensor: torch.Tensor) -> torch.Tensor:
    """A collective's result, arrived."""
    return functional.wait_tensor(tensor)


def swap_rows(top: torch.Tensor, bottom: torch.Tensor, axis: Axis) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The bottom rows of the process above and the top rows of the one below; None at the first and the last.

    Args:
        top, bottom: of this process, of one shape.
    """
    above, below = axis.index > 0, axis.index + 1 < axis.size
    sent = [int(other in (axis.index - 1, axis.index + 1)) for other in range(axis.size)]
    rows = torch.stack([*([top] if above else []), *([bottom] if below else [])])
    received = all_to_all(rows, sent, sent, axis)
    return received[0] if above else None, received[-1] if below else None
