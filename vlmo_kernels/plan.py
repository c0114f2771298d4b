"""The plan of one batch, computed on the device from modality ids, without host synchronisation.

`plan_in_torch` is the specification and runs anywhere; where the compiled parts are built they compute the same tables
in two launches. The functions at the end read lengths on the host into modality ids.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch

from .runtime import compiled
from .runtime.library import define

define("plan(Tensor ids, Tensor? mask, int modalities) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")

_MOST_COMPILED = 15  # modalities; kMaxModalities in csrc/include/vlmo_kernels/device_plan.h


def group_count(modalities: int) -> int:
    """Two groups a modality: its tokens in samples of its own, and in samples that mix modalities."""
    return 2 * modalities


def group_of(modality: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    """Group index of a token.

    The first modality's groups are ordered (alone, mixed), all others' (mixed, alone): with two
    modalities the mixed groups are neighbours, so an expert for both is one row range.
    """
    second = torch.where(modality == 0, mixed, ~mixed)
    return 2 * modality + second.to(modality.dtype)


def plan(ids: torch.Tensor, mask: torch.Tensor | None, modalities: int) -> tuple[torch.Tensor, ...]:
    """Tables of a batch whose padded size is `B * N`; static shapes, rows past the last group are dead.

    A registered op (`vlmo_kernels::plan`), so a compiled model that plans in every block plans once.

    Args:
        ids: integer `[B, N]`, the modality of every token, -1 for padding.
        mask: bool or 0/1 `[B, N]`, true for real tokens, or None.
        modalities: number of modalities.

    Returns:
        int32 `cu_seqlens [B + 1]`, `rows [B*N]`, `positions [B*N]`, `sample_of_row [B*N]`,
        `group_offsets [2 * modalities + 1]`, `row_of_token [B*N]` (-1 for padding).
    """
    if not torch.compiler.is_compiling():
        _check_size(ids)
    return torch.ops.vlmo_kernels.plan(ids, mask, modalities)


def _check_size(ids: torch.Tensor) -> None:
    if ids.numel() >= 2**31 - 1:  # the tables are int32
        raise ValueError(f"ModalityLayout: ids must have fewer than 2**31 - 1 entries, got {list(ids.shape)}")


def plan_in_torch(ids: torch.Tensor, mask: torch.Tensor | None, modalities: int) -> tuple[torch.Tensor, ...]:
    """See `plan`; two stable sorts and a few sums."""
    _check_size(ids)
    batch, length = ids.shape
    groups = group_count(modalities)
    ids = ids.long()
    if mask is not None:
        ids = torch.where(mask.bool(), ids, -1)
    ids = torch.where(ids < modalities, ids, -1)  # unknown ids, unchecked on a device, are padding
    token = torch.arange(batch * length, device=ids.device)
    present = torch.stack([(ids == m).any(1) for m in range(modalities)], 1)
    mixed = present.sum(1) > 1
    group = torch.where(ids >= 0, group_of(ids.clamp(min=0), mixed[:, None].expand_as(ids)), groups)
    group = group.reshape(-1)

    token_of_row = torch.argsort(group, stable=True)  # groups in order, padding last
    row_of_token = torch.empty_like(token)
    row_of_token[token_of_row] = token
    live = group < groups
    token_in_order = torch.argsort((~live).to(torch.int8), stable=True)  # samples in order, padding last
    counts = (group[None, :] == torch.arange(groups, device=ids.device)[:, None]).sum(1)
    dead_row = group[token_of_row] == groups
    sample = torch.where(dead_row, -1, token_of_row // max(length, 1))

    def offsets(sizes: torch.Tensor) -> torch.Tensor:
        return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])

    tables = (
        offsets(live.view(batch, length).sum(1)),
        row_of_token[token_in_order],
        token_of_row % max(length, 1),
        sample,
        offsets(counts),
        torch.where(live, row_of_token, -1),
    )
    return tuple(table.to(torch.int32) for table in tables)


def _plan_compiled(ops, ids: torch.Tensor, mask: torch.Tensor | None, modalities: int) -> tuple[torch.Tensor, ...]:
    """By the compiled planner where it is built and takes the arguments; the tables are the same."""
    op = getattr(ops, "plan", None)
    if op is None or modalities > _MOST_COMPILED:
        return plan_in_torch(ids, mask, modalities)
    if ids.dtype not in (torch.int32, torch.int64):
        ids = ids.long()
    return op(ids, None if mask is None else mask.bool(), modalities)


def _plan_on_cpu(ids: torch.Tensor, mask: torch.Tensor | None, modalities: int) -> tuple[torch.Tensor, ...]:
    return _plan_compiled(compiled.cpu_ops(), ids, mask, modalities)


def _plan_on_cuda(ids: torch.Tensor, mask: torch.Tensor | None, modalities: int) -> tuple[torch.Tensor, ...]:
    return _plan_compiled(compiled.cuda_ops(), ids, mask, modalities)


def _plan_meta(ids: torch.Tensor, mask: torch.Tensor | None, modalities: int) -> tuple[torch.Tensor, ...]:
    batch, length = ids.shape
    sizes = (batch + 1, *(batch * length,) * 3, group_count(modalities) + 1, batch * length)
    return tuple(ids.new_empty(size, dtype=torch.int32) for size in sizes)


torch.library.impl("vlmo_kernels::plan", "CompositeExplicitAutograd")(plan_in_torch)
torch.library.impl("vlmo_kernels::plan", "CPU")(_plan_on_cpu)
torch.library.impl("vlmo_kernels::plan", "CUDA")(_plan_on_cuda)
torch.library.register_fake("vlmo_kernels::plan")(_plan_meta)


def modality_names(given: Sequence[str]) -> tuple[str, ...]:
    """The names of a layout's modalities, checked."""
    if isinstance(given, str):
        raise TypeError(f"ModalityLayout: `modalities` must be a sequence of names, got the string {given!r}")
    names = tuple(given)
    if not all(isinstance(n, str) for n in names):
        raise TypeError(f"ModalityLayout: modality names must be strings, got {names}")
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"ModalityLayout: `modalities` must be distinct and not empty, got {names}")
    if any("." in n for n in names):
        raise ValueError(f"ModalityLayout: modality names must not contain a dot, got {names}")
    return names


def as_list(modality: str, lengths) -> object:
    """Lengths as given by the user: a list, or what is hoped to be one integer for all samples."""
    if isinstance(lengths, torch.Tensor):
        if lengths.is_meta:
            raise ValueError(
                f"ModalityLayout: lengths of {modality!r} must have values, got a tensor on meta. "
                'Hint: give them as a list, and device="meta" for tables without values'
            )
        return lengths.tolist()
    return list(lengths) if hasattr(lengths, "__iter__") else lengths


def _as_int(modality: str, n) -> int:
    try:
        value = operator.index(n)
    except TypeError:
        value = None
    if value is None or isinstance(n, bool):
        raise TypeError(f"ModalityLayout: lengths of {modality!r} must be integers, got {n!r}")
    if value < 0:
        raise ValueError(f"ModalityLayout: lengths of {modality!r} must not be negative, got {value}")
    return value


def ids_of_runs(runs, names: tuple[str, ...], starts: Mapping[str, int] | None) -> torch.Tensor:
    """int64 `[B, N]`: modality of the token at every position of every sample, -1 where there is none."""
    unknown = set(starts or ()) - set(names)
    if unknown:
        raise ValueError(f"ModalityLayout: `starts` must use {names}, got {sorted(unknown)}")
    if any(start < 0 for start in (starts or {}).values()):
        raise ValueError(f"ModalityLayout: `starts` must not be negative, got {dict(starts)}")
    placed = [_placed_runs(b, sample, names, starts or {}) for b, sample in enumerate(runs)]
    length = max((end for sample in placed for _, _, end in sample), default=0)
    if len(placed) * length >= 2**31 - 1:
        raise ValueError(
            f"ModalityLayout: samples times padded length must be below 2**31 - 1, got {len(placed)} x {length}"
        )
    ids = torch.full((len(placed), length), -1, dtype=torch.int64, device="cpu")
    for b, sample in enumerate(placed):
        for modality, start, end in sample:
            ids[b, start:end] = modality
    return ids


def _placed_runs(
    b: int, sample, names: tuple[str, ...], starts: Mapping[str, int]
) -> list[tuple[int, int, int]]:
    """`(modality, first position, end position)` of the sample's non-empty runs."""
    placed: list[tuple[int, int, int]] = []
    cursor, started = 0, set()
    for modality, length in sample:
        if modality not in names:
            raise ValueError(f"ModalityLayout: runs must use {names}, got {modality!r} in sample {b}")
        length = _as_int(modality, length)
        if modality not in started:
            cursor = starts.get(modality, cursor)
            started.add(modality)
        if length:
            placed.append((names.index(modality), cursor, cursor + length))
        cursor += length
    in_order = sorted(placed, key=lambda run: run[1])
    if any(later[1] < earlier[2] for earlier, later in zip(in_order, in_order[1:])):
        raise ValueError(f"ModalityLayout: `starts` {dict(starts)} make positions collide in sample {b}")
    return placed
