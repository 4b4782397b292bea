"""The joint stream split by rows, and attention over all of them.

Each process holds consecutive rows of `[text; video]`. All that a block does with a row alone it does as if there were
no others; attention exchanges rows for heads (Ulysses), so that each process attends over all rows of its piece of the
ring with some of the heads, and keys and values go round the ring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import collectives
from .degrees import Payload, pieces, video_pieces
from .ranks import Axis, Ranks

# Over query, key and value `(batch, rows, heads, head_dim)`: the attended values, of that shape.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Likewise, and the logarithms of the sums of exponentials `(batch, rows, heads)`, fp32.
AttendPart = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class SequenceSplit:
    """Which rows of the stream are whose.

    Attributes:
        rows: of each process of the sequence, in order; of a ring's piece its ulysses' in a row.
        text: rows of the stream that are text, before all others.
        index: which of the processes this is.
    """

    rows: tuple[int, ...]
    text: int
    index: int
    ulysses: Axis
    ring: Axis
    payload: Payload = Payload.NATIVE

    @classmethod
    def of(cls, ranks: Ranks, text: int, total: int) -> SequenceSplit:
        """The split of a stream of `total` rows, `text` of them text.

        Raises:
            ValueError: for a stream with fewer rows than processes.
        """
        if total < ranks.sequence.size:
            raise ValueError(f"a stream of {total} rows cannot be split over {ranks.sequence.size} processes")
        rows = tuple(pieces(total, ranks.sequence.size))
        return cls(rows, text, ranks.sequence.index, ranks.ulysses, ranks.ring, Payload(ranks.config.payload))

    @property
    def first(self) -> int:
        """Of the stream, the first row of this process."""
        return sum(self.rows[: self.index])

    @property
    def last(self) -> int:
        """The row behind its last."""
        return self.first + self.rows[self.index]

    @property
    def own_text(self) -> int:
        """How many of its rows are text: they come first."""
        return min(max(self.text - self.first, 0), self.rows[self.index])

    def own(self, stream: torch.Tensor) -> torch.Tensor:
        """The rows of this process of `stream` `(batch, sequence, dim)`; of the text alone, those of it."""
        return stream[:, self.first : self.last]

    def own_video(self, table: torch.Tensor) -> torch.Tensor:
        """Of a table with a row for each of the video's, those of this process."""
        first, last = self.own_video_rows
        return table[first:last]

    @property
    def own_video_rows(self) -> tuple[int, int]:
        """The first of the video's rows that is this process's, and the one behind the last."""
        return max(self.first - self.text, 0), max(self.last - self.text, 0)

    def video_rows(self) -> list[int]:
        """How many rows of the video each process has."""
        return video_pieces(self.rows, self.text)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attend: Attend, attend_part: AttendPart
    ) -> torch.Tensor:
        """Attention of this process's rows over all rows.

        Args:
            query, key, value: of its rows, `(batch, rows, heads, head_dim)`.
            attend: attention over all rows that it is given; where there is no ring.
            attend_part: where there is one.

        Returns:
            `(batch, rows, heads, head_dim)`.
        """
        if self.ulysses.size > 1:
            query, key, value = self._rows_for_heads(query, key, value)
        output = attend(query, key, value) if self.ring.size == 1 else self._round(query, key, value, attend_part)
        return self._heads_for_rows(output) if self.ulysses.size > 1 else output

    @property
    def _near(self) -> list[int]:
        """Rows of each process of this one's piece of the ring."""
        size = self.ulysses.size
        return list(self.rows[self.ring.index * size :][:size])

    def _rows_for_heads(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each of `(batch, own rows, heads, head_dim)` as `(batch, rows of the piece, own heads, head_dim)`."""
        parts_number = self.ulysses.size
        own = parts[0].shape[1]
        packed = torch.stack([part.unflatten(2, (parts_number, -1)) for part in parts])
        # (part, batch, row, to whom, head, dim) -> (to whom, row, part, batch, head, dim)
        packed = _in_order(packed.permute(3, 2, 0, 1, 4, 5)).flatten(0, 1)
        received = self._exchanged(packed, [own] * parts_number, self._near)
        return tuple(received.permute(1, 2, 0, 3, 4).unbind(0))

    def _heads_for_rows(self, output: torch.Tensor) -> torch.Tensor:
        """`(batch, rows of the piece, own heads, head_dim)` as `(batch, own rows, heads, head_dim)`."""
        own, parts_number = self.rows[self.index], self.ulysses.size
        rows = _in_order(output.transpose(0, 1))
        received = self._exchanged(rows, self._near, [own] * parts_number)
        return received.unflatten(0, (parts_number, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def _exchanged(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        if self.payload is Payload.NATIVE:
            return collectives.all_to_all(rows, sent, received, self.ulysses)
        arrived = collectives.all_to_all(in_8_bits(rows), sent, received, self.ulysses)
        return from_8_bits(arrived, rows.dtype)

    def _round(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attend_part: AttendPart
    ) -> torch.Tensor:
        """Attention over the whole ring: a piece of keys and values at a time, the next under way meanwhile."""
        size, near = self.ring.size, self.ulysses.size
        lengths = [sum(self.rows[i * near : (i + 1) * near]) for i in range(size)]
        moving = torch.stack([key, value])
        missing = max(lengths) - moving.shape[2]
        if missing:  # of the tensor that travels; nobody attends to it
            moving = torch.cat([moving, moving.new_zeros(*moving.shape[:2], missing, *moving.shape[3:])], dim=2)
        total: torch.Tensor | None = None
        sums: torch.Tensor | None = None
        for turn in range(size):
            following = collectives.to_next(moving, self.ring) if turn + 1 < size else None
            # Not by brackets: they ask for the device, so that the graph of a GPU could not be traced without one.
            piece = moving.narrow(2, 0, lengths[(self.ring.index - turn) % size])
            output, part_sums = attend_part(query, *piece.unbind(0))
            if total is None or sums is None:
                total, sums = output.float(), part_sums
            else:
                # Both are means, weighed by what their exponentials sum to.
                both = torch.logaddexp(sums, part_sums)
                before, part = ((each - both).exp().unsqueeze(-1) for each in (sums, part_sums))
                total = total * before + output * part
                sums = both
            if following is not None:
                moving = collectives.wait(following).squeeze(0)
        assert total is not None
        return total.to(query.dtype)


def _in_order(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, copied where it is not; by a call that a graph for GPUs can be traced with where there is none."""
    return tensor.flatten().view(tensor.shape)


def in_8_bits(rows: torch.Tensor) -> torch.Tensor:
    """int8 `(..., head_dim + 4)` of `(..., head_dim)`: numbers by the largest of a row, and its scale in four bytes.

    Rounded to the nearest; the error is at most half of 1/127 of the largest.
    """
    scale = rows.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-30) / 127
    numbers = (rows / scale).round().to(torch.int8)
    return torch.cat([numbers, scale.view(torch.int8)], dim=-1)


def from_8_bits(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `in_8_bits` has packed."""
    head_dim = packed.shape[-1] - 4
    numbers, scale = packed.split([head_dim, 4], dim=-1)
    return (numbers * _in_order(scale).view(torch.float32)).to(dtype)
