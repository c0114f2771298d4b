"""Which packed rows belong to which expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

Experts = Mapping[str, int]
_ABSENT = "a modality that a batch lacks stays in its layout with lengths of 0"


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


def expert_segments(
    op: str, experts: Experts | None, count: int, modalities: tuple[str, ...], groups: tuple[str, ...]
) -> tuple[tuple[int, int, int], ...]:
    """`(first group, end group, expert)` for an expert map, neighbouring groups of one expert as one.

    Args:
        op: for the errors.
        experts: modality or group to expert, groups first; None: the i-th modality has expert i, or all the one.
        count: number of experts.
        modalities, groups: of the layout, groups in row order.
    """
    if experts is None:
        if count not in (1, len(modalities)):
            raise ValueError(
                f"{op}: without `experts` there must be one expert, or one for each of the layout's modalities "
                f"{modalities}, got {count}. Hint: `experts` says whose is whose; {_ABSENT}"
            )
        experts = {m: i if count > 1 else 0 for i, m in enumerate(modalities)}
    elif not isinstance(experts, Mapping) or not all(isinstance(e, int) for e in experts.values()):
        raise TypeError(
            f'{op}: `experts` must map modalities to integers, got {experts!r}. Hint: {{"text": 0, "image": 1}}'
        )
    of_group = [experts.get(g, experts.get(g.rpartition(".")[0])) for g in groups]
    unknown = sorted(set(experts) - set(groups) - set(modalities), key=str)
    missing = [g for g, e in zip(groups, of_group) if e is None]
    if unknown or missing:
        what = f"unknown: {', '.join(map(repr, unknown))}" if unknown else f"none for {', '.join(map(repr, missing))}"
        raise ValueError(
            f"{op}: `experts` must name the layout's modalities {modalities} or their groups, all of them and no "
            f"others, got {dict(experts)}, {what}. Hint: {_ABSENT}"
        )
    segments: list[tuple[int, int, int]] = []
    for g, (name, expert) in enumerate(zip(groups, of_group)):
        if not 0 <= expert < count:
            raise ValueError(f"{op}: `experts` must map {name!r} to 0..{count - 1}, got {expert}")
        if segments and segments[-1][2] == expert:
            segments[-1] = (segments[-1][0], g + 1, expert)
        else:
            segments.append((g, g + 1, expert))
    return tuple(segments)
