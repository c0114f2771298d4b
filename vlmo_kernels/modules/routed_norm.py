"""`RoutedNorm`: LayerNorm or RMSNorm with one affine part per expert."""

from __future__ import annotations

import torch
from torch import nn

from vlmo_kernels.layout import Experts, ModalityLayout
from vlmo_kernels.ops import routed_norm
from vlmo_kernels.ops.routed_norm import check_kind
from vlmo_kernels.runtime.dispatch import check_impl

from .experts import check_names, experts_by_name


class RoutedNorm(nn.Module):
    """One norm per expert, on packed rows. Parameters are `<name>.weight` and, for "layer", `<name>.bias`.

    Args:
        dim: width `D`.
        names: name of every expert's norm; the i-th is expert i.
        experts: modality or group to expert; by default a modality has the expert of its name, or, where one has
            none, the i-th modality has expert i.
        kind: "layer", "rms" or "rms1p".
        eps: added to the variance.

    Shape:
        `[T, D]` to `[T, D]`; with a residual a pair, the second being the sum.
    """

    def __init__(
        self,
        dim: int,
        names: tuple[str, ...] = ("text", "image"),
        experts: Experts | None = None,
        kind: str = "layer",
        eps: float = 1e-6,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_kind("RoutedNorm", kind)
        self.names, self.experts, self.kind, self.eps = check_names("RoutedNorm", names), experts, kind, eps
        self.impl = check_impl("RoutedNorm", impl)
        for name in names:
            self.add_module(name, nn.LayerNorm(dim, eps) if kind == "layer" else nn.RMSNorm(dim, eps))
        if kind == "rms1p":
            for name in names:
                nn.init.zeros_(getattr(self, name).weight)  # the factor is 1 + w

    def forward(self, x: torch.Tensor, layout: ModalityLayout, *, residual: torch.Tensor | None = None):
        """See `vlmo_kernels.routed_norm`."""
        norms = [getattr(self, name) for name in self.names]
        biases = [m.bias for m in norms] if self.kind == "layer" else None
        return routed_norm(
            x, [m.weight for m in norms], biases, layout,
            experts_by_name("RoutedNorm", self.names, self.experts, layout),
            kind=self.kind, eps=self.eps, residual=residual, impl=self.impl,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, eps={self.eps}, experts={self.experts}, impl={self.impl!r}"
