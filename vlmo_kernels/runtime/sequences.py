"""Which packed rows belong to which sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sequences:
    """The samples of one packed buffer, as attention reads them.

    Attributes:
        cu_seqlens: int32 `[B + 1]`, first sample-major position of every sample.
        rows: int32 `[T]`, packed row of every sample-major position. Sample `b` owns
            `rows[cu_seqlens[b] : cu_seqlens[b + 1]]`; entries from `cu_seqlens[-1]` on are dead.
        positions: int32 `[T]`, by packed row: the token's position in its original sample. Biases are
            indexed by it and causal masks compare it.
        max_seqlen: an upper bound on the length of any sample, known on the host.
    """

    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    max_seqlen: int
