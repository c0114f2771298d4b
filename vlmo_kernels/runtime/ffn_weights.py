"""The weights of a routed feed-forward network, one list entry per expert."""

from __future__ import annotations

from typing import Any, NamedTuple


class FFNWeights(NamedTuple):
    """Lists of equal length, one entry per expert; None where an expert has no such weight.

    `w1` is `[F, D]`, `w2` is `[D_out, F]`. Gated activations add the up projection `w_up` `[F, D]` and use
    `w1` as the gate. `gamma` `[D_out]` is LayerScale, `norm_weight` and `norm_bias` `[F]` an inner LayerNorm
    on the hidden activations. The same tuple carries gradients, and flags that say which are wanted.
    """

    w1: list[Any]
    b1: list[Any]
    w2: list[Any]
    b2: list[Any]
    w_up: list[Any]
    b_up: list[Any]
    gamma: list[Any]
    norm_weight: list[Any]
    norm_bias: list[Any]

    @property
    def experts(self) -> int:
        return len(self.w1)

    def expert(self, index: int) -> FFNWeights:
        """The entries of one expert, as a tuple of values instead of lists."""
        return FFNWeights(*(field[index] for field in self))
