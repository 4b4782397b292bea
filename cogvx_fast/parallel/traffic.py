"""What processes send each other, from shapes alone: formulas that the tests hold against what is really sent."""

from __future__ import annotations

from dataclasses import dataclass

from .degrees import ParallelConfig, Payload, pieces, video_pieces

SCALE = 4  # bytes that go with each row of a head in 8 bits


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that one process sends in a denoising step, the largest of all processes'.

    Attributes:
        heads: of Q, K, V and attended values, for heads of others (ulysses).
        ring: of keys and values that go on.
        output: of the predicted tokens, and of samples.
    """

    heads: int
    ring: int
    output: int

    @property
    def total(self) -> int:
        return self.heads + self.ring + self.output


def step_traffic(
    config: ParallelConfig,
    *,
    rows: int,
    text: int,
    heads: int,
    head_dim: int,
    layers: int,
    numbers_per_token: int,
    samples: int,
    itemsize: int,
) -> StepTraffic:
    """The traffic of a step.

    Of a piece of the stream with `n` rows, in each layer, with `u` for ulysses and `r` for ring:
    `4 * n * heads * head_dim * (u - 1) / u` numbers for heads, Q, K and V there and attended values back;
    `2 * longest * heads / u * head_dim * (r - 1)` around the ring, `longest` the rows of its longest piece.

    Args:
        rows, text: of the stream, and of these the text's.
        numbers_per_token: that the network predicts.
        samples: of a step, all processes'.
        itemsize: bytes of a number.
    """
    own_samples = samples // config.guidance if samples % config.guidance == 0 else samples
    split = pieces(rows, config.sequence)
    u, width = config.ulysses, heads // config.ulysses * head_dim
    row = head_dim + SCALE if config.payload is Payload.INT8 else head_dim * itemsize
    sent_heads = 0
    for index, own in enumerate(split):
        near = split[index // u * u :][:u]
        # Q, K and V of own rows to each of the others, attended values of the others' rows back to them.
        exchanged = 3 * own * (u - 1) + sum(near) - own
        sent_heads = max(sent_heads, exchanged * heads // u * row)
    lengths = [sum(split[i * u : (i + 1) * u]) for i in range(config.ring)]
    ring = 2 * max(lengths) * width * itemsize * (config.ring - 1)
    predicted = max(video_pieces(split, text)) * own_samples * numbers_per_token * (config.sequence - 1)
    parts = 1 if own_samples == samples else config.guidance
    gathered = own_samples * (rows - text) * numbers_per_token * (parts - 1)
    return StepTraffic(
        heads=layers * own_samples * sent_heads,
        ring=layers * own_samples * ring,
        output=(predicted + gathered) * itemsize,
    )
