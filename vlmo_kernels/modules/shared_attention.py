"""`SharedAttention`: multi-head self-attention over all modalities of a sample."""

from __future__ import annotations

import torch
from torch import nn

from vlmo_kernels.layout import ModalityLayout
from vlmo_kernels.ops import RelativePositionBias, routed_linear, shared_attention
from vlmo_kernels.runtime.dispatch import check_impl


class SharedAttention(nn.Module):
    """Multi-head self-attention with the parameter names of timm's: `qkv.weight|bias`, `proj.weight|bias`.

    One bias for the whole projection: VLMo's separate `q_bias` and `v_bias` would cost a fill and a
    concatenation at every call (the key part changes nothing, since softmax is invariant to it).

    Args:
        dim: width `D`.
        heads: number of heads.
        qkv_bias: whether `qkv` has one.
        dropout: probability, on the output projection.

    Shape:
        `[T, D]` to `[T, D]`.
    """

    def __init__(
        self, dim: int, heads: int, qkv_bias: bool = True, dropout: float = 0.0, impl: str = "auto"
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"SharedAttention: `dim` must be a multiple of `heads` {heads}, got {dim}")
        self.heads, self.dropout = heads, dropout
        self.impl = check_impl("SharedAttention", impl)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: torch.Tensor,
        layout: ModalityLayout,
        *,
        bias: torch.Tensor | RelativePositionBias | None = None,
        causal: bool = False,
        prefix: torch.Tensor | None = None,
        gamma: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        row_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`residual + row_scale * gamma * proj(attention(qkv(x)))`; see `vlmo_kernels.shared_attention`."""
        width = x.shape[1]
        qkv = routed_linear(x, [self.qkv.weight], [self.qkv.bias], layout, impl=self.impl)
        qkv = qkv.view(-1, 3, self.heads, width // self.heads)
        o = shared_attention(qkv, None, None, layout, bias=bias, causal=causal, prefix=prefix, impl=self.impl)
        drop = self.training and self.dropout > 0.0
        y = routed_linear(
            o.view(-1, width), [self.proj.weight], [self.proj.bias], layout,
            gamma=[gamma], residual=None if drop else residual, row_scale=row_scale, impl=self.impl,
        )  # fmt: skip
        if drop:  # dropout stands between the branch and the sum, so the fused sum cannot be used
            y = nn.functional.dropout(y, self.dropout)
            y = y if residual is None else residual + y
        return y

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dropout={self.dropout}, impl={self.impl!r}"
