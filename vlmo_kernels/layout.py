"""`ModalityLayout`: where every token of a batch lies in the packed, modality-major buffer.

The rows of a packed buffer `[T, D]` are grouped by modality, so an expert's tokens are one contiguous
range, and no layer sorts, gathers or scatters. Attention finds a sample's tokens through one int32 row
table. See docs/layout.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from .host_plan import plan_columns, plan_runs
from .plan import as_list, group_count, ids_of_runs, modality_names, plan
from .rows import gather_rows
from .runtime.check import checks_on_device, usable_device
from .runtime.route import Experts, Route, expert_segments
from .runtime.sequences import Sequences

Runs = Sequence[Sequence[tuple[str, int]]]


@dataclass(frozen=True, eq=False, repr=False)
class ModalityLayout:
    """The plan of one batch. Build it with one of the `from_*` constructors; share it between layers.

    Each modality has two *groups*: `"<modality>.alone"` holds its tokens in samples of that modality
    alone, `"<modality>.mixed"` its tokens in samples with several. Expert maps name modalities or groups.

    Attributes:
        modalities: names, in the order of their rows.
        batch: number of samples `B`.
        max_seqlen: upper bound on the (padded) length of a sample, `N`.
        cu_seqlens: int32 `[B + 1]`, first sample-major position of every sample.
        rows: int32 `[T]`, sample-major position to packed row.
        positions: int32 `[T]`, packed row to the token's position in its sample as the model counts it.
        sample_of_row: int32 `[T]`, packed row to sample, -1 for dead rows.
        group_offsets: int32 `[G + 1]`, first row of every group; rows from the last entry on are dead.
        row_of_token: int32 `[B * N]`, token `b * N + position` to packed row, -1 for padding.
        host_offsets: `group_offsets` in a CPU tensor where lengths were known on the host, else None.
    """

    modalities: tuple[str, ...]
    batch: int
    max_seqlen: int
    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    sample_of_row: torch.Tensor
    group_offsets: torch.Tensor
    row_of_token: torch.Tensor
    host_offsets: torch.Tensor | None = None

    # ------------------------------------------------------------------ constructors

    @classmethod
    def from_lengths(
        cls,
        lengths: Mapping[str, int | Sequence[int] | torch.Tensor],
        *,
        starts: Mapping[str, int] | None = None,
        device: torch.device | str = "cpu",
    ) -> ModalityLayout:
        """One run per modality in each sample, in the order of the mapping.

        Args:
            lengths: modality to its number of tokens in every sample (an int holds for all samples;
                zero where a sample lacks the modality).
            starts: modality to the position of its first token, for models that pad between modalities
                (VLMo: `{"text": 0, "image": 40}`). By default a sample's tokens are numbered from 0.
            device: where the tables go.

        Raises:
            TypeError: `lengths` is no mapping, or holds a length that is no integer.
            ValueError: no modality, unequal numbers of samples, a negative length, lengths without values (a meta
                tensor), or an unknown device.
            RuntimeError: a device that is not here.

        Example:
            >>> ModalityLayout.from_lengths({"text": [7, 3], "image": 197}).rows.shape
            torch.Size([404])
        """
        if not isinstance(lengths, Mapping):
            raise TypeError(
                f"ModalityLayout.from_lengths: `lengths` must map modalities to lengths, got {type(lengths).__name__}. "
                'Hint: {"text": [7, 3], "image": 197}'
            )
        if not lengths:
            raise ValueError("ModalityLayout.from_lengths: `lengths` must name at least one modality, got none")
        names = modality_names(tuple(lengths))
        listed = {m: as_list(m, n) for m, n in lengths.items()}
        sizes = {len(n) for n in listed.values() if isinstance(n, list)}
        if len(sizes) > 1:
            given = {m: len(n) for m, n in listed.items() if isinstance(n, list)}
            raise ValueError(f"ModalityLayout.from_lengths: each modality must have one length per sample, got {given}")
        batch = sizes.pop() if sizes else 1
        if (found := plan_columns(listed, batch, names, starts)) is not None:
            return cls._from_host_tables(found, batch, names, device)
        columns = {m: n if isinstance(n, list) else [n] * batch for m, n in listed.items()}
        runs = [[(m, column[b]) for m, column in columns.items()] for b in range(batch)]
        return cls._from_host_ids(ids_of_runs(runs, names, starts), names, device)

    @classmethod
    def from_runs(
        cls,
        runs: Runs,
        *,
        modalities: Sequence[str] | None = None,
        starts: Mapping[str, int] | None = None,
        device: torch.device | str = "cpu",
    ) -> ModalityLayout:
        """Any interleaving: each sample is a sequence of `(modality, length)` runs in token order.

        Args:
            runs: one sequence of runs per sample.
            modalities: order of the modalities' rows; by default the order of first appearance.
            starts: position of a modality's first run; see `from_lengths`.
            device: where the tables go.

        Raises:
            ValueError: a negative length, an unknown modality, or starts that make positions collide.
            TypeError: a length that is no integer.
        """
        used = tuple(dict.fromkeys(m for sample in runs for m, _ in sample))
        names = modality_names(used if modalities is None else modalities)
        if (found := plan_runs(runs, names, starts)) is not None:
            return cls._from_host_tables(found, len(runs), names, device)
        return cls._from_host_ids(ids_of_runs(runs, names, starts), names, device)

    @classmethod
    def from_modality_ids(
        cls,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        modalities: Sequence[str],
    ) -> ModalityLayout:
        """From ids on any device, without waiting for it: the layout has the static capacity `T = B * N`.

        Args:
            ids: integer `[B, N]`, index into `modalities`; negative values are padding.
            mask: bool or 0/1 `[B, N]`, true for real tokens, or None.
            modalities: names.

        Raises:
            TypeError: `ids` or `mask` is no tensor.
            ValueError: wrong shapes or devices; ids out of range when they are on the host (on a device
                only with `VLMO_KERNELS_CHECK=1`).
        """
        modalities = modality_names(modalities)
        for name, t in (("ids", ids), ("mask", ids if mask is None else mask)):
            if not isinstance(t, torch.Tensor):
                raise TypeError(f"ModalityLayout.from_modality_ids: `{name}` must be a tensor, got {type(t).__name__}")
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(
                f"ModalityLayout.from_modality_ids: `ids` must be integer [B, N], got {ids.dtype} {list(ids.shape)}"
            )
        if mask is not None:
            if mask.shape != ids.shape or mask.device != ids.device:
                raise ValueError(
                    f"ModalityLayout.from_modality_ids: `mask` must match `ids` {list(ids.shape)} on {ids.device}, "
                    f"got {list(mask.shape)} on {mask.device}"
                )
        if checks_on_device(ids) and ids.numel():
            if mask is not None and mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
                raise ValueError(
                    "ModalityLayout.from_modality_ids: `mask` must be bool or 0/1, true for real tokens, got "
                    f"{mask.dtype} with other values. Hint: of a mask that is added to scores it is `mask == 0`"
                )
            largest = int((ids if mask is None else torch.where(mask.bool(), ids, -1)).max())
            if largest >= len(modalities):
                raise ValueError(
                    f"ModalityLayout.from_modality_ids: ids must be below {len(modalities)} (modalities "
                    f"{modalities}), got {largest}"
                )
        return cls._from_tables(plan(ids, mask, len(modalities)), ids.shape, modalities)

    @classmethod
    def from_split(
        cls,
        batch: int,
        length: int,
        split: int,
        mask: torch.Tensor | None = None,
        *,
        modalities: Sequence[str] = ("image", "text"),
        device: torch.device | str | None = None,
    ) -> ModalityLayout:
        """The first `split` tokens of every sample are the first modality, the rest the second (torchscale).

        Args:
            batch: number of samples.
            length: padded length of a sample.
            split: 0 to `length`; -1 stands for `length` (torchscale: everything is the first modality).
            mask: bool or 0/1 `[batch, length]`, true for real tokens, or None.
            modalities: two names, first part first.
            device: of the tables; that of the mask by default.
        """
        if not -1 <= split <= length:
            raise ValueError(f"ModalityLayout.from_split: `split` must be -1 or 0 to {length}, got {split}")
        if device is None:
            device = "cpu" if mask is None else mask.device
        device = usable_device("ModalityLayout", device)
        split = length if split == -1 else split
        ids = (torch.arange(length, device=device) >= split).long().expand(batch, length)
        return cls.from_modality_ids(ids, mask, modalities=modalities)

    @classmethod
    def from_xformers(cls, attn_bias, ids: torch.Tensor, *, modalities: Sequence[str]) -> ModalityLayout:
        """From an xformers `BlockDiagonalMask` and the modality id of every token of its packed sequence.

        Args:
            attn_bias: `xformers.ops.fmha.attn_bias.BlockDiagonalMask` of a self-attention.
            ids: integer `[total tokens]`, in the sample-major order of the mask.
            modalities: names.
        """
        if not hasattr(attn_bias, "q_seqinfo"):
            raise TypeError(
                "ModalityLayout.from_xformers: `attn_bias` must be a BlockDiagonalMask, "
                f"got {type(attn_bias).__name__}"
            )
        bounds = list(attn_bias.q_seqinfo.seqstart_py)
        if list(attn_bias.k_seqinfo.seqstart_py) != bounds:
            raise ValueError("ModalityLayout.from_xformers: queries and keys must be the same sequences")
        if ids.shape != (bounds[-1],):
            raise ValueError(
                f"ModalityLayout.from_xformers: `ids` must be [{bounds[-1]}], got {list(ids.shape)}"
            )
        device, ids = ids.device, ids.cpu()
        lengths = [b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        padded = torch.full((len(lengths), max(lengths, default=0)), -1, dtype=torch.int64)
        for b, n in enumerate(lengths):
            padded[b, :n] = ids[bounds[b] : bounds[b] + n]
        return cls._from_host_ids(padded, modality_names(modalities), device)

    @classmethod
    def _from_host_ids(cls, ids: torch.Tensor, names: tuple[str, ...], device) -> ModalityLayout:
        """Exact capacity: dead rows are cut off, since the host knows how many there are."""
        if ids.numel() and int(ids.max()) >= len(names):
            raise ValueError(f"ModalityLayout: ids must be below {len(names)}, got {int(ids.max())}")
        return cls._from_tables(plan(ids, None, len(names)), ids.shape, names).exact().to(device)

    @classmethod
    def _from_host_tables(cls, found, batch: int, names: tuple[str, ...], device) -> ModalityLayout:
        length, tables = found
        exact = cls._from_tables(tables, (batch, length), names)
        return replace(exact, host_offsets=exact.group_offsets).to(device)

    @classmethod
    def _from_tables(cls, tables, shape, names: tuple[str, ...]) -> ModalityLayout:
        cu_seqlens, rows, positions, sample_of_row, group_offsets, row_of_token = tables
        return cls(
            modalities=names,
            batch=shape[0],
            max_seqlen=shape[1],
            cu_seqlens=cu_seqlens,
            rows=rows,
            positions=positions,
            sample_of_row=sample_of_row,
            group_offsets=group_offsets,
            row_of_token=row_of_token,
        )

    # ------------------------------------------------------------------ moving rows

    @property
    def tokens(self) -> int:
        """Rows `T` of a packed buffer, dead rows included."""
        return self.rows.shape[0]

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def pack_padded(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, N, ...]` to packed `[T, ...]`; dead rows are zero. Differentiable."""
        if x.shape[:2] != (self.batch, self.max_seqlen):
            raise ValueError(
                f"ModalityLayout.pack_padded: `x` must start with [{self.batch}, {self.max_seqlen}], "
                f"got {list(x.shape)}"
            )
        flat = x.flatten(0, 1).flatten(1) if x.dim() > 2 else x.reshape(-1, 1)
        return gather_rows(flat, self.token_of_row(), self.row_of_token).view(self.tokens, *x.shape[2:])

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """Packed `[T, ...]` to `[B, N, ...]`, each token at its position; padding is zero. Differentiable."""
        self._check_rows("unpack", x)
        flat = x.flatten(1) if x.dim() > 1 else x[:, None]
        padded = gather_rows(flat, self.row_of_token, self.token_of_row())
        return padded.view(self.batch, self.max_seqlen, *x.shape[1:])

    def pack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One tensor per modality to packed `[T, ...]`; dead rows are zero. Differentiable.

        Args:
            parts: modality to `[B, L, D]` (each sample's tokens of that modality first, the rest is
                ignored) or to `[tokens of the modality, D]` (sample after sample). A modality without
                tokens may be left out.

        Raises:
            ValueError: missing or unknown modalities, or sizes that do not fit.
        """
        if not isinstance(parts, Mapping):
            raise TypeError(
                f"ModalityLayout.pack: `parts` must map modalities to tensors, got {type(parts).__name__}. "
                "Hint: pack_padded takes one padded tensor"
            )
        order = dict(zip(self.modalities, self._modality_rows(), strict=True))
        given = [m for m in self.modalities if m in parts]
        lacking = [m for m in self.modalities if m not in parts and int(order[m][3].sum())]
        if lacking or not given or len(given) < len(parts):
            raise ValueError(
                f"ModalityLayout.pack: `parts` must have {self.modalities}, each that has tokens, got {tuple(parts)}"
            )
        pieces, sources, base = [], [], 0
        for name in given:
            part = parts[name]
            sample, ordinal, flat_index, counts = order[name]
            if part.dim() >= 3:
                longest = int(counts.max() if counts.numel() else 0)
                if part.shape[0] != self.batch or part.shape[1] < longest:
                    raise ValueError(
                        f"ModalityLayout.pack: `{name}` must be [{self.batch}, at least {longest}, ...], "
                        f"got {list(part.shape)}"
                    )
                index = sample * part.shape[1] + ordinal
                part = part.flatten(0, 1)
            else:
                count = int(counts.sum())
                if part.shape[0] != count:
                    raise ValueError(f"ModalityLayout.pack: `{name}` must have {count} rows, got {part.shape[0]}")
                index = flat_index
            pieces.append(part)
            sources.append(index + base)
            base += part.shape[0]
        widths = {name: tuple(piece.shape[1:]) for name, piece in zip(given, pieces, strict=True)}
        if len(set(widths.values())) > 1:
            raise ValueError(f"ModalityLayout.pack: all parts must have rows of one shape, got {widths}")
        live = torch.cat(pieces)[torch.cat(sources)]
        dead = live.new_zeros(self.tokens - live.shape[0], *live.shape[1:])
        return torch.cat([live, dead]) if len(dead) else live

    def unpack_modalities(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Packed `[T, ...]` to one `[tokens of the modality, ...]` tensor each, sample after sample."""
        self._check_rows("unpack_modalities", x)
        result = {}
        for m, view in enumerate(self.split(x).values()):
            _, _, flat_index, _ = self._modality_rows()[m]
            inverse = torch.empty_like(flat_index)
            inverse[flat_index] = torch.arange(flat_index.numel(), device=flat_index.device)
            result[self.modalities[m]] = view[inverse]
        return result

    def split(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of the rows of each modality, in packed order. No copy; needs lengths known on the host."""
        self._check_rows("split", x)
        at = self._host_list("split")
        return {m: x[at[2 * i] : at[2 * i + 2]] for i, m in enumerate(self.modalities)}

    def token_of_row(self) -> torch.Tensor:
        """int32 `[T]`: `sample * N + position` of every packed row, -1 for dead rows."""
        token = self.sample_of_row * self.max_seqlen + self.positions
        return torch.where(self.sample_of_row >= 0, token, -1)

    def _modality_rows(self):
        """Per modality: sample, k-th token of it in the sample, index in sample order, counts per sample."""
        at = self._host_list("pack")
        result = []
        for m in range(len(self.modalities)):
            rows = slice(at[2 * m], at[2 * m + 2])
            sample, position = self.sample_of_row[rows].long(), self.positions[rows].long()
            counts = torch.bincount(sample, minlength=self.batch)
            order = torch.argsort(sample * self.max_seqlen + position)
            flat_index = torch.empty_like(order)
            flat_index[order] = torch.arange(order.numel(), device=order.device)
            starts = counts.cumsum(0) - counts
            result.append((sample, flat_index - starts[sample], flat_index, counts))
        return result

    # ------------------------------------------------------------------ what ops read

    def route(self, experts: Experts | None, count: int, op: str = "ModalityLayout.route") -> Route:
        """The row ranges of every expert.

        Args:
            experts: modality or group to expert, groups first; None: the i-th modality has expert i, or all the one.
            count: number of experts.
            op: whose experts they are, for the errors.

        Raises:
            TypeError: `experts` is no mapping to integers.
            ValueError: a modality without expert, an unknown name, an expert out of range, or without `experts`
                neither one expert nor as many as modalities.
        """
        segments = expert_segments(op, experts, count, self.modalities, self.groups)
        return Route(self.group_offsets, self.host_offsets, segments)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups in row order."""
        names = []
        for i, m in enumerate(self.modalities):
            names += [f"{m}.alone", f"{m}.mixed"] if i == 0 else [f"{m}.mixed", f"{m}.alone"]
        return tuple(names)

    def sequences(self) -> Sequences:
        """The samples, as attention reads them."""
        return Sequences(self.cu_seqlens, self.rows, self.positions, self.max_seqlen)

    # ------------------------------------------------------------------ life of a plan

    def exact(self) -> ModalityLayout:
        """The same plan without dead rows and with its lengths known on the host; waits for the device."""
        if self.host_offsets is not None:
            return self
        known = self.group_offsets.cpu()
        live = int(known[-1])
        return replace(
            self,
            rows=self.rows[:live].clone(),
            positions=self.positions[:live].clone(),
            sample_of_row=self.sample_of_row[:live].clone(),
            host_offsets=known,
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ModalityLayout:
        """The same plan with its tables on `device`; what the host knows stays on the host.

        Args:
            device: where the tables go.
            non_blocking: do not wait for the copies, as in `Tensor.to`: only from pinned memory do they overlap.

        Raises:
            TypeError, ValueError: no device, or one that torch does not know.
            RuntimeError: a device that is not here.
        """
        device = usable_device("ModalityLayout", device)
        moved = {f: getattr(self, f).to(device, non_blocking=non_blocking) for f in _TABLES}
        return replace(self, **moved)

    def copy_(self, other: ModalityLayout) -> ModalityLayout:
        """Take over another batch's plan in place, for the next replay of a captured graph.

        `other` may have fewer samples' worth of rows than this capacity, never more. Both must have
        been built for the same batch size, padded length and modalities; a plan of static capacity
        (`from_modality_ids`) can take any batch of that shape.

        Raises:
            ValueError: other shapes, or a plan whose lengths were fixed on the host.
        """
        if self.host_offsets is not None:
            raise ValueError(
                "ModalityLayout.copy_: the target's lengths must be known on the device only, got a plan made "
                "from host lengths. Hint: build it with from_modality_ids"
            )
        mine = (self.modalities, self.batch, self.max_seqlen)
        if mine != (other.modalities, other.batch, other.max_seqlen) or other.tokens > self.tokens:
            raise ValueError(
                f"ModalityLayout.copy_: the plans must have equal modalities, batch and length, {mine} with room "
                f"for {self.tokens} rows, got {(other.modalities, other.batch, other.max_seqlen)} with {other.tokens}"
            )
        live = other.tokens
        for name in _TABLES:
            source, target = getattr(other, name), getattr(self, name)
            target[: source.shape[0]].copy_(source)
        self.sample_of_row[live:].fill_(-1)
        return self

    def _host_list(self, caller: str) -> list[int]:
        known = self.group_offsets if self.host_offsets is None else self.host_offsets
        if known.device.type != "cpu":
            raise NotImplementedError(
                f"ModalityLayout.{caller}: lengths must be known on the host, got a plan made on {self.device}. "
                "Hint: use from_lengths, or pack_padded and unpack"
            )
        return known.tolist()

    def _check_rows(self, caller: str, x: torch.Tensor) -> None:
        if x.shape[:1] != (self.tokens,):
            raise ValueError(
                f"ModalityLayout.{caller}: `x` must have {self.tokens} rows, got {list(x.shape)}"
            )

    def __repr__(self) -> str:
        known = self.group_offsets if self.host_offsets is None else self.host_offsets
        head = f"ModalityLayout({self.batch} samples of up to {self.max_seqlen} tokens, {self.device}"
        if known.device.type != "cpu":
            return f"{head}, capacity {self.tokens} rows)"
        at = known.tolist()
        groups = (f"{g} {b - a}" for g, a, b in zip(self.groups, at[:-1], at[1:], strict=True) if b > a)
        return f"{head}, {at[-1]} of {self.tokens} rows: {', '.join(groups) or 'empty'})"


_TABLES = [f.name for f in fields(ModalityLayout) if f.type == "torch.Tensor"]


assert group_count(1) == 2  # `split` and `_modality_rows` count on two neighbouring groups a modality
