"""Muon (Jordan et al. 2024) in float32: torch's own rounds to bf16, very slow on a CPU without units for it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch

MOMENTUM = 0.95
_ITERATIONS = 5
_QUINTIC = (3.4445, -4.775, 2.0315)  # Jordan's, steepest at 0
_RMS = 0.2  # of an AdamW step, which this one's is scaled to (Moonlight, Liu et al. 2025)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices `(n, rows, columns)`, singular values all made about 1 by Newton-Schulz iterations."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    first, third, fifth = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices alone; with Nesterov's momentum."""

    def __init__(self, matrices: Iterable[torch.nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for (rows, columns), found in alike.items():
                updates = torch.stack([self._momentum(matrix) for matrix in found])
                rate = group["lr"] * _RMS * math.sqrt(max(rows, columns))
                torch._foreach_mul_(found, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(found, list(orthogonal(updates)), alpha=-rate)

    def _momentum(self, matrix: torch.nn.Parameter) -> torch.Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        state["momentum"].lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(state["momentum"], MOMENTUM)
