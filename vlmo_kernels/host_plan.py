"""The compiled planner for lengths that the host knows.

It answers None where it is not built or where something is wrong with the lengths: the way through torch (`plan.py`)
gives the same tables and says what is wrong.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import torch

from .runtime import compiled

# Padded length N, then cu_seqlens, rows, positions, sample_of_row, group_offsets and row_of_token of exact capacity.
HostTables = tuple[int, tuple[torch.Tensor, ...]]


def plan_columns(
    columns: Mapping[str, object], batch: int, names: tuple[str, ...], starts: Mapping[str, int] | None
) -> HostTables | None:
    """One run per modality in each sample.

    Args:
        columns: for each of `names` its length (an int, for all samples) or the list of its lengths in every sample.
        batch: number of samples.
        names: of the modalities, in the order of the runs.
        starts: position of a modality's first run.
    """
    each = len(names)
    try:
        lengths = array("q", bytes(8 * each * batch))
        for m, name in enumerate(names):
            column = columns[name]
            lengths[m::each] = _int64s(column) if isinstance(column, list) else _int64s([column]) * batch
    except (TypeError, OverflowError):
        return None
    return _plan(array("q", range(each)) * batch, lengths, array("q", [each]) * batch, names, starts)


def plan_runs(
    runs: Sequence[Sequence[tuple[str, int]]], names: tuple[str, ...], starts: Mapping[str, int] | None
) -> HostTables | None:
    """Any interleaving; see `ModalityLayout.from_runs`."""
    index = {name: m for m, name in enumerate(names)}
    try:
        flat = [(index[m], n) for sample in runs for m, n in sample]
        modality, length = zip(*flat) if flat else ((), ())
        of_sample = array("q", [len(sample) for sample in runs])
        return _plan(array("q", modality), _int64s(length), of_sample, names, starts)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _int64s(values: Sequence[int]) -> array:
    if bool in set(map(type, values)):  # the one integer that is no length
        raise TypeError
    return array("q", values)


def _plan(
    modality: array, length: array, runs_of_sample: array, names: tuple[str, ...], starts: Mapping[str, int] | None
) -> HostTables | None:
    planner = compiled.host_planner()
    starts = starts or {}
    if planner is None or torch.compiler.is_compiling() or not set(starts) <= set(names):
        return None
    if any(start < 0 for start in starts.values()):  # -1 stands for no start below
        return None
    try:
        first = array("q", [starts.get(name, -1) for name in names])
        padded_length, *tables = planner.plan(modality, length, runs_of_sample, first)
    except (TypeError, ValueError, OverflowError):
        return None
    return padded_length, tuple(map(_tensor, tables))


def _tensor(table) -> torch.Tensor:
    """int32 over the planner's memory, which lives as long as the tensor."""
    if len(memoryview(table)) == 0:  # frombuffer takes no empty buffer
        return torch.empty(0, dtype=torch.int32, device="cpu")
    return torch.frombuffer(table, dtype=torch.int32)
