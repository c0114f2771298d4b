"""CPU `routed_norm`: a compiled kernel, or torch's vectorised LayerNorm, one call per expert range."""

from __future__ import annotations

import torch

from vlmo_kernels.reference import routed_norm as reference
from vlmo_kernels.runtime import compiled
from vlmo_kernels.runtime.route import Route

from .gemm import finish

Optional = torch.Tensor | None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(request) -> str | None:
    """Why this path cannot take a call, or None."""
    if request.dtype not in DTYPES:
        return f"takes fp32, bf16 and fp16, got {request.dtype}"
    if "layer" not in request.features and compiled.cpu_ops() is None:
        return f"torch has no fused RMSNorm for the CPU; compiled: {compiled.why_not('vlmo_kernels_cpu')}"
    return None


def how(request) -> str:
    """What runs, for `explain`."""
    if compiled.cpu_ops() is not None:
        return f"compiled kernels ({compiled.instructions()})"
    return f"torch's native_layer_norm; compiled kernels: {compiled.why_not('vlmo_kernels_cpu')}"


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
    if compiled.cpu_ops() is not None and (residual is None or residual.dtype == x.dtype):
        return _compiled_forward(x, residual, weights, biases, route, kind, eps)
    # RMSNorm of mixed dtypes, and statistics in fp64
    if kind != "layer" or (residual is not None and residual.dtype not in DTYPES):
        return reference.forward(x, residual, weights, biases, route, kind, eps)
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
    if z.dtype not in DTYPES:  # an fp64 residual
        return reference.backward(dy, dz, z, weights, biases, mean, rstd, route, kind, need_dw, need_db)
    if compiled.cpu_ops() is not None:
        return _compiled_backward(dy, dz, z, weights, biases, mean, rstd, route, kind, need_dw, need_db)
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


def _compiled_forward(x, residual, weights, biases, route: Route, kind: str, eps: float):
    y = x.new_empty(x.shape)
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    z = None if residual is None else x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[0], dtype=torch.float32)
    mean = x.new_empty(x.shape[0], dtype=torch.float32) if kind == "layer" else None
    for start, end, e in route.ranges():
        rows = slice(start, end)
        compiled.cpu_ops().norm_forward(
            x[rows], _part(residual, rows), _wide(weights[e]), _wide(biases[e]), kind == "rms1p", eps,
            y[rows], _part(z, rows), _part(mean, rows), rstd[rows],
        )  # fmt: skip
    return y, z, mean, rstd


def _compiled_backward(dy, dz, z, weights, biases, mean, rstd, route: Route, kind: str, need_dw, need_db):
    dx = z.new_empty(z.shape)
    dx[route.live_rows() :] = 0
    dy = dy.to(z.dtype)
    dw, db = [None] * len(weights), [None] * len(weights)
    for start, end, e in route.ranges():
        rows = slice(start, end)
        sums = [z.new_empty(z.shape[1], dtype=torch.float32) if n[e] else None for n in (need_dw, need_db)]
        compiled.cpu_ops().norm_backward(
            dy[rows], _part(dz, rows), z[rows], _wide(weights[e]), _part(mean, rows), rstd[rows], kind == "rms1p",
            dx[rows], *sums,
        )  # fmt: skip
        for total, value in zip((dw, db), sums, strict=True):
            if value is not None:
                total[e] = value if total[e] is None else total[e] + value
    return dx, finish(dw, weights, need_dw), finish(db, biases, need_db)


def _part(t: Optional, rows: slice) -> Optional:
    return None if t is None else t[rows]


def _wide(t: Optional) -> Optional:
    return None if t is None else t.float().contiguous()


def _affine(weight: Optional, bias: Optional, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias in fp32: only then does torch keep 16-bit inputs' statistics in fp32."""
    width = z.shape[1]
    w = z.new_ones(width, dtype=torch.float32) if weight is None else weight.float()
    return w, z.new_zeros(width, dtype=torch.float32) if bias is None else bias.float()
