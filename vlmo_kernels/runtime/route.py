"""Which packed rows belong to which expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Route:
    """Expert ranges of one packed buffer.

    Rows are grouped, so an expert's rows are whole groups: `segments` names them, `offsets` says where
    they start. Segments are fixed by the model; only the tensors change from batch to batch, which is
    why nothing here makes `torch.compile` recompile.

    Attributes:
        offsets: int32 `[G + 1]` on the data's device, the first row of every group; rows from
            `offsets[-1]` on are dead.
        host_offsets: the same values in a CPU tensor where lengths were known on the host, else None.
        segments: `(first group, end group, expert)`, ascending, covering every group once.
    """

    offsets: torch.Tensor
    host_offsets: torch.Tensor | None
    segments: tuple[tuple[int, int, int], ...]

    def _host(self) -> list[int]:
        known = self.offsets if self.host_offsets is None else self.host_offsets
        return known.tolist()  # waits for the device where only the device knows the lengths

    def ranges(self) -> list[tuple[int, int, int]]:
        """Non-empty `(first row, end row, expert)` ranges, ascending."""
        at = self._host()
        return [(at[a], at[b], e) for a, b, e in self.segments if at[b] > at[a]]

    def live_rows(self) -> int:
        """Number of live rows; they come first."""
        return self._host()[-1]

    def flat_segments(self) -> list[int]:
        return [value for segment in self.segments for value in segment]

    @staticmethod
    def from_flat(offsets: torch.Tensor, host_offsets: torch.Tensor | None, flat: list[int]) -> Route:
        triples = tuple((flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3))
        return Route(offsets, host_offsets, triples)
