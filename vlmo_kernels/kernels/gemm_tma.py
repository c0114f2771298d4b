"""Operand tiles of the routed GEMM through the tensor memory accelerator (sm_90 and newer).

One thread asks for a whole tile, so no registers hold addresses and no warp spends instructions on copies. What
describes a tensor (its address, shape and strides) is made on the host and travels with the launch: weights stay
where they are, and a captured graph replays it. Descriptors must be arguments of their own (Triton takes no tuple of
them), hence the fixed number.

A tile may run over its segment's end into the next one's rows, or into dead ones: a row of a product depends on that
row alone, and those are never stored. Past the end of a tensor and of the contraction there are zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

MOST_SEGMENTS = 4
ALIGNMENT = 16  # bytes, of addresses and strides (CUDA driver API, cuTensorMapEncodeTiled)


# ---------------------------------------------------------------- device


@triton.jit
def pick(D0, D1, D2, D3, index, COUNT: tl.constexpr):
    """Descriptor number `index` of COUNT."""
    chosen = D0
    if COUNT > 1:
        if index == 1:
            chosen = D1
    if COUNT > 2:
        if index == 2:
            chosen = D2
    if COUNT > 3:
        if index == 3:
            chosen = D3
    return chosen


@triton.jit
def accumulate_boxes(
    acc, A, W, row, column, K: tl.constexpr, BK: tl.constexpr, W_IS_NK: tl.constexpr, PRECISION: tl.constexpr
):
    """`gemm.accumulate` with descriptors of A `[T, K]` and of W `[N, K]` (W_IS_NK) or `[K, N]`."""
    for step in tl.range(0, (K + BK - 1) // BK):
        a_tile = A.load([row, step * BK])
        if W_IS_NK:
            acc = tl.dot(a_tile, W.load([column, step * BK]).T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a_tile, W.load([step * BK, column]), acc, input_precision=PRECISION)
    return acc


@triton.jit
def accumulate_gated_boxes(
    gate, up, A, W, W_UP, row, column, K: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """`accumulate_boxes` for two weights `[N, K]` that share every tile of A."""
    for step in tl.range(0, (K + BK - 1) // BK):
        a_tile = A.load([row, step * BK])
        gate = tl.dot(a_tile, W.load([column, step * BK]).T, gate, input_precision=PRECISION)
        up = tl.dot(a_tile, W_UP.load([column, step * BK]).T, up, input_precision=PRECISION)
    return gate, up


# ---------------------------------------------------------------- host


def describe(
    operands: list[torch.Tensor | None],
    weights: list[tuple[torch.Tensor, ...] | None],
    box: tuple[int, int],
    weight_box: tuple[int, int],
) -> tuple[list[TensorDescriptor | None], list[TensorDescriptor | None]] | None:
    """Descriptors of the operands and, MOST_SEGMENTS for each entry of `weights`, of the weights; None if one has none.

    Args:
        operands: `[T, K]` each; weights: a `[N, K]` or `[K, N]` for every segment. None is passed on.
        box, weight_box: rows and columns of their tiles.
    """
    given = [t for t in operands if t is not None] + [t for ts in weights if ts is not None for t in ts]
    if any(len(ts) > MOST_SEGMENTS for ts in weights if ts is not None) or not all(map(_has_descriptor, given)):
        return None

    def one(t: torch.Tensor | None, box: tuple[int, int]) -> TensorDescriptor | None:
        return None if t is None else TensorDescriptor.from_tensor(t, list(box))

    padded = [t for ts in weights for t in (*(ts or ()), *[None] * (MOST_SEGMENTS - len(ts or ())))]
    return [one(t, box) for t in operands], [one(t, weight_box) for t in padded]


def _has_descriptor(t: torch.Tensor) -> bool:
    """Whether the hardware can address it: rows one after the other, each at 16 bytes."""
    step = t.stride(0) * t.element_size()
    aligned = t.data_ptr() % ALIGNMENT == 0 and step % ALIGNMENT == 0
    new_enough = t.device.type == "cpu" or torch.cuda.get_device_capability(t.device) >= (9, 0)  # cpu: interpreter
    return new_enough and aligned and t.numel() > 0 and t.stride(0) >= t.shape[1] and t.stride(1) == 1
