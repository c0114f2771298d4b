"""The machine's own best GEMM rate, measured beside the contestants: what their rates are a share of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from vlmo_kernels.cpu import onednn

from .cases import Case

SQUARE = 8192  # fills the largest GPU


@dataclass(frozen=True)
class Product:
    """A bare GEMM and its FLOPs."""

    call: Callable[[], torch.Tensor]
    flops: float


@dataclass(frozen=True)
class Ceiling:
    """The best rate that was seen, and of what."""

    gflops: float
    what: str


def square(device: torch.device | str, dtype: torch.dtype, size: int = SQUARE) -> dict[str, Product]:
    """One large product through torch, by name."""
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    return {f"torch.mm {size}x{size}x{size}": Product(partial(torch.mm, a, b), 2.0 * size**3)}


def products(case: Case, device: torch.device | str, dtype: torch.dtype) -> dict[str, Product]:
    """What the ceiling of a case is the best of, by name.

    On a CPU the two dense layers of an expert over all tokens, by every library at hand: which one is fastest differs
    from machine to machine, and so does what a shape is worth. A GPU has one large product.
    """
    if torch.device(device).type != "cpu":
        return square(device, dtype)
    found: dict[str, Product] = {}
    for k, n in ((case.dim, case.hidden), (case.hidden, case.dim)):
        x, w = torch.randn(case.tokens, k).to(dtype), torch.randn(n, k).to(dtype)
        calls = {"F.linear": partial(F.linear, x, w), "torch.mm": partial(torch.mm, x, w.t().contiguous())}
        if onednn.why_not(dtype) is None:
            packed = torch.ops.mkldnn._reorder_linear_weight(w, case.tokens)
            linear = torch.ops.mkldnn._linear_pointwise
            calls["oneDNN with packed weight"] = partial(linear, x, packed, None, "none", [], None)
        shape = f"{case.tokens}x{k}x{n}"
        found |= {f"{name} {shape}": Product(call, 2.0 * case.tokens * k * n) for name, call in calls.items()}
    return found


def best(tried: dict[str, Product], times_ms: dict[str, Sequence[float]]) -> Ceiling | None:
    """The highest rate of any product in any round; None where none was tried."""
    rates = {name: p.flops / min(times_ms[name]) / 1e6 for name, p in tried.items()}
    what = max(rates, key=rates.__getitem__, default=None)
    return None if what is None else Ceiling(rates[what], what)
