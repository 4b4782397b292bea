"""The ablation: from diffusers to the whole engine, one optimization more in each row, with what it should gain."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..config import EngineConfig
from .contenders import CONTENDERS, Contender, ours


@dataclass(frozen=True)
class Addition:
    """One row of the ablation.

    Attributes:
        name: of what is added to the row before.
        config: the engine with it, and with all that the rows before have.
        expected: the factor over the row before, by workload and dtype ("dit-2b bfloat16"), predicted and not
            measured; what is not in it was not predicted.
        why: the arithmetic behind the prediction.
    """

    name: str
    config: EngineConfig
    expected: Mapping[str, float] = field(default_factory=dict)
    why: str = ""


_NOTHING = EngineConfig(modulation_table=False, reuse_text_projection=False)

# Predictions are for a CPU. Work of one dit-2b step: 646 GFLOP in linears, 68 in attention.
ADDITIONS: tuple[Addition, ...] = (
    Addition(
        "joint stream",
        _NOTHING,
        {"dit-2b bfloat16": 1.06},
        "copies are 6% of diffusers' bf16 step by its profile, most of them cat and split of the two streams",
    ),
    Addition(
        "+ text projection once",
        EngineConfig(modulation_table=False),
        {"dit-2b bfloat16": 1.01, "dit-2b float32": 1.01},
        "2 x 226 rows of 4096 to 1920 are 7 of 714 GFLOP",
    ),
    Addition(
        "+ modulation table",
        EngineConfig(),
        {"dit-2b bfloat16": 1.005, "dit-2b float32": 1.003},
        "71 MB of bf16 weights (142 MB in fp32) for two rows: 3.5 ms (7 ms) at 20 GB/s",
    ),
)


def ablation(workload: str, dtype: str, additions: Sequence[Addition] = ADDITIONS) -> dict[str, Contender]:
    """Contenders in the order of the ablation; the first is diffusers, eager."""
    contenders = {"diffusers": CONTENDERS["diffusers"]}
    for addition in additions:
        expected = addition.expected.get(f"{workload} {dtype}")
        contenders[addition.name] = Contender(
            functools.partial(ours, config=addition.config),
            addition.name,
            stages=("dit-step", "generation"),
            expected_gain=expected,
            expected_why=addition.why if expected is not None else None,
        )
    return contenders
