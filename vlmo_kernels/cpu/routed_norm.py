"""CPU `routed_norm`: torch's vectorised LayerNorm, one call per expert range."""

from __future__ import annotations

import torch

from vlmo_kernels.runtime.route import Route

from .routed_linear import finish

Optional = torch.Tensor | None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(request) -> str | None:
    """Why this path cannot take a call, or None."""
    if "layer" not in request.features:
        return "torch has no fused RMSNorm for the CPU"
    if request.dtype not in DTYPES:
        return f"takes fp32, bf16 and fp16, got {request.dtype}"
    return None


def forward(
    x: torch.Tensor,
    residual: Optional,
    weights: list[Optional],
    biases: list[Optional],
    route: Route,
    kind: str,
    eps: float,
) -> tuple[torch.Tensor, Optional, Optional, torch.Tensor]:
    """See `vlmo_kernels.reference.routed_norm.forward`."""
    z = x if residual is None else torch.add(residual, x).to(residual.dtype)
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    for start, end, e in route.ranges():
        part, m, r = torch.native_layer_norm(
            z[start:end], z.shape[1:], *_affine(weights[e], biases[e], z), eps
        )
        if (start, end) == (0, x.shape[0]) and part.dtype == y.dtype:
            return part, (None if residual is None else z), m.view(-1), r.view(-1)
        y[start:end], mean[start:end], rstd[start:end] = part, m.view(-1), r.view(-1)
    return y, (None if residual is None else z), mean, rstd


def backward(
    dy: torch.Tensor,
    dz: Optional,
    z: torch.Tensor,
    weights: list[Optional],
    biases: list[Optional],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    route: Route,
    kind: str,
    need_dw: list[bool],
    need_db: list[bool],
) -> tuple[torch.Tensor, list[Optional], list[Optional]]:
    """See `vlmo_kernels.reference.routed_norm.backward`."""
    dx = z.new_zeros(z.shape)
    dw, db = [None] * len(weights), [None] * len(weights)
    for start, end, e in route.ranges():
        rows = slice(start, end)
        part, dw_e, db_e = torch.ops.aten.native_layer_norm_backward(
            dy[rows].to(z.dtype), z[rows], z.shape[1:], mean[rows, None], rstd[rows, None],
            *_affine(weights[e], biases[e], z), [True, need_dw[e], need_db[e]],
        )  # fmt: skip
        dx[rows] = part if dz is None else part + dz[rows]
        for total, value, wanted in ((dw, dw_e, need_dw[e]), (db, db_e, need_db[e])):
            if wanted:
                total[e] = value if total[e] is None else total[e] + value
    return dx, finish(dw, weights, need_dw), finish(db, biases, need_db)


def _affine(weight: Optional, bias: Optional, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias in fp32: only then does torch keep 16-bit inputs' statistics in fp32."""
    width = z.shape[1]
    w = z.new_ones(width, dtype=torch.float32) if weight is None else weight.float()
    return w, z.new_zeros(width, dtype=torch.float32) if bias is None else bias.float()
