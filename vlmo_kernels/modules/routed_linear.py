"""`RoutedLinear`: `torch.nn.Linear` with one weight per expert."""

from __future__ import annotations

import torch
from torch import nn

from vlmo_kernels.layout import Experts, ModalityLayout
from vlmo_kernels.ops import routed_linear
from vlmo_kernels.runtime.dispatch import check_impl

from .experts import check_names, experts_by_name


class RoutedLinear(nn.Module):
    """One `nn.Linear` per expert, on packed rows.

    Args:
        in_features, out_features: as in `nn.Linear`.
        names: name of every expert's layer; the i-th is expert i. Parameters are `<name>.weight`, `<name>.bias`.
        experts: modality or group to expert; by default a modality has the expert of its name, or, where one has
            none, the i-th modality has expert i.
        bias: whether the layers have one.

    Shape:
        `[T, in_features]` to `[T, out_features]`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        names: tuple[str, ...] = ("text", "image"),
        experts: Experts | None = None,
        bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.names, self.experts = check_names("RoutedLinear", names), experts
        self.impl = check_impl("RoutedLinear", impl)
        for name in names:
            self.add_module(name, nn.Linear(in_features, out_features, bias=bias))

    def forward(
        self,
        x: torch.Tensor,
        layout: ModalityLayout,
        *,
        gamma: list[torch.Tensor | None] | None = None,
        residual: torch.Tensor | None = None,
        row_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `vlmo_kernels.routed_linear`."""
        layers = [getattr(self, name) for name in self.names]
        return routed_linear(
            x, [m.weight for m in layers], [m.bias for m in layers], layout,
            experts_by_name("RoutedLinear", self.names, self.experts, layout),
            gamma=gamma, residual=residual, row_scale=row_scale, impl=self.impl,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"names={self.names}, experts={self.experts}, impl={self.impl!r}"
