"""`RoutedFFN`: one feed-forward network per expert."""

from __future__ import annotations

import torch
from torch import nn

from vlmo_kernels.layout import Experts, ModalityLayout
from vlmo_kernels.ops import routed_ffn
from vlmo_kernels.ops.routed_ffn import GATED, check_options
from vlmo_kernels.runtime.dispatch import check_impl

from .experts import check_names, experts_by_name


class Mlp(nn.Module):
    """The two layers of one expert, with the parameter names of timm's and VLMo's `Mlp`."""

    def __init__(self, dim: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc_up = nn.Linear(dim, hidden) if gated else None
        self.fc2 = nn.Linear(hidden, dim)


class RoutedFFN(nn.Module):
    """Mixture of modality experts (Bao et al. 2022, section 3.1), on packed rows.

    Parameters are `<name>.fc1.*`, `<name>.fc2.*` and, for gated activations, `<name>.fc_up.*`.

    Args:
        dim, hidden: widths `D` and `F`.
        names: name of every expert; the i-th is expert i.
        experts: modality or group to expert; by default a modality has the expert of its name, or, where one has
            none, the i-th modality has expert i.
        activation: see `vlmo_kernels.routed_ffn`.
        dropout: probability, on the output of the branch, before the residual.
        recompute: see `vlmo_kernels.routed_ffn`.

    Shape:
        `[T, D]` to `[T, D]`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        names: tuple[str, ...] = ("text", "image"),
        experts: Experts | None = None,
        activation: str = "gelu",
        dropout: float = 0.0,
        recompute: str = "activation",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_options("RoutedFFN", activation, recompute)
        self.names, self.experts, self.activation = check_names("RoutedFFN", names), experts, activation
        self.dropout, self.recompute = dropout, recompute
        self.impl = check_impl("RoutedFFN", impl)
        for name in names:
            self.add_module(name, Mlp(dim, hidden, activation in GATED))

    def forward(
        self,
        x: torch.Tensor,
        layout: ModalityLayout,
        *,
        gamma: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        row_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`residual + row_scale * gamma * ffn[e](x)`; `gamma` `[D]` is shared by the experts."""
        mlps = [getattr(self, name) for name in self.names]
        gated = self.activation in GATED
        drop = self.training and self.dropout > 0.0
        y = routed_ffn(
            x,
            [m.fc1.weight for m in mlps],
            [m.fc1.bias for m in mlps],
            [m.fc2.weight for m in mlps],
            [m.fc2.bias for m in mlps],
            layout,
            experts_by_name("RoutedFFN", self.names, self.experts, layout),
            activation=self.activation,
            w_up=[m.fc_up.weight for m in mlps] if gated else None,
            b_up=[m.fc_up.bias for m in mlps] if gated else None,
            gamma=None if gamma is None else [gamma] * len(mlps),
            residual=None if drop else residual,
            row_scale=row_scale,
            recompute=self.recompute,
            impl=self.impl,
        )
        if drop:  # dropout stands between the branch and the sum, so the fused sum cannot be used
            y = nn.functional.dropout(y, self.dropout)
            y = y if residual is None else residual + y
        return y

    def extra_repr(self) -> str:
        return (
            f"activation={self.activation!r}, experts={self.experts}, dropout={self.dropout}, "
            f"recompute={self.recompute!r}, impl={self.impl!r}"
        )
