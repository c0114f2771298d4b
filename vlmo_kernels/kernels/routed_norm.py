"""Routed LayerNorm and RMSNorm: residual add, statistics and the row's expert's affine part in one pass.

A program owns a fixed block of rows and takes the segments that cross it one after the other, so no row is
read twice and a segment may start anywhere. Weights are separate Parameters: the kernels get one pointer per
segment as a tuple argument (a tuple of pointers is compiled into plain kernel parameters: no table has to be
written to the device before each launch), and unroll over the few segments at compile time. Which rows a
segment has is read from `offsets` on the device.

Weight gradients are sums over rows. Each program adds up its rows in a fixed order into one row of a partial
buffer, and a second kernel adds these up in order: no atomics, the same bits every time. Program `p` puts
segment `s` into slot `p + s`: rows ascend with `p` and segments with rows, so slots are unique, and those of
one segment are consecutive.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from ..runtime.audit_case import AuditCase
from ..runtime.route import Route
from .norm_bwd import norm_backward, norm_reduce, norm_weight_grad
from .norm_fwd import norm_forward

Optional = torch.Tensor | None

MAX_COLUMNS = 16384  # one row must fit the registers of one program
# 4 programs on each of 132 multiprocessors. A constant, so that sums have the same order on every GPU.
MAX_PARTIALS = 528
REDUCE_COLUMNS, REDUCE_SLOTS = 64, 32
# Above it dx and the two sums of a row spill (940 bytes at 16384): the sums get a kernel of their own, and
# the weight, 120 bytes of spill on sm_100, is read again for every row.
FUSED_COLUMNS = 8192
WEIGHT_GRAD_ROWS, WEIGHT_GRAD_COLUMNS = 16, 128


class Config(NamedTuple):
    """Rows of one tile, its columns (a power of two, at least D), and warps of one program."""

    rows: int
    columns: int
    warps: int


def config_for(columns: int, backward: bool) -> Config:
    """Tile of 32 values a thread forward and 16 backward, where seven such tiles are live at once.

    Beyond 2048 (backward) or 4096 columns a row takes more warps, 16 at most: with 32 a thread has 64
    registers, which is at the edge of spilling.
    """
    width = max(triton.next_power_of_2(columns), 16)
    per_warp = 512 if backward else 1024
    return Config(
        rows=max(1, min(4 * per_warp // width, 16)),
        columns=width,
        warps=min(max(4, width // per_warp), 16),
    )


def forward(
    x: torch.Tensor,
    residual: Optional,
    weights: list[Optional],
    biases: list[Optional],
    route: Route,
    kind: str,
    eps: float,
) -> tuple[torch.Tensor, Optional, Optional, torch.Tensor]:
    """`y = norm(x + residual) * weights[e] + biases[e]`, one launch.

    Args:
        x: `[T, D]`, D at most 16384.
        residual: `[T, D]` or None; its dtype may be another.
        weights: one `[D]` or None per expert; with `kind="rms1p"` the factor is `1 + w` (Gemma).
        biases: one `[D]` or None per expert.
        kind: "layer" (Ba et al. 2016), "rms" or "rms1p" (Zhang and Sennrich 2019).

    Returns:
        `y` `[T, D]` in the dtype of `x`; `z = x + residual` in the dtype of the residual, or None; mean `[T]`
        (None for RMSNorm) and reciprocal standard deviation `[T]`, fp32. Dead rows are unspecified.
    """
    rows, columns = _shape(x)
    x, residual = _unit_stride(x), _unit_stride(residual)
    y = x.new_empty(rows, columns)
    z = None if residual is None else residual.new_empty(rows, columns)
    mean = x.new_empty(rows, dtype=torch.float32) if kind == "layer" else None
    rstd = x.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return y, z, mean, rstd
    config = config_for(columns, backward=False)
    with torch.cuda.device_of(x):
        norm_forward[(triton.cdiv(rows, config.rows),)](
            x,
            residual,
            _by_segment(weights, route),
            _by_segment(biases, route),
            route.offsets,
            y,
            z,
            mean,
            rstd,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            BOUNDS=_bounds(route),
            KIND=kind,
            D=columns,
            ROWS=config.rows,
            COLUMNS=config.columns,
            num_warps=config.warps,
        )
    return y, z, mean, rstd


def backward(
    dy: torch.Tensor,
    dz: Optional,
    z: torch.Tensor,
    weights: list[Optional],
    biases: list[Optional],
    mean: Optional,
    rstd: torch.Tensor,
    route: Route,
    kind: str,
    need_dw: list[bool],
    need_db: list[bool],
) -> tuple[torch.Tensor, list[Optional], list[Optional]]:
    """Gradient of `z` (which is that of `x` and of the residual alike), of the weights and biases.

    One launch, and one more (two where D > 8192) where a weight or bias gradient is wanted.

    Returns:
        dx `[T, D]` in the dtype of `z`, zero in dead rows; per expert dw and db `[D]` in the dtype of the
        weight and bias, or None where not wanted.
    """
    rows, columns = _shape(z)
    dy, dz, z = _unit_stride(dy), _unit_stride(dz), _unit_stride(z)
    dx = z.new_empty(rows, columns)
    dws = _wanted(weights, need_dw)
    dbs = _wanted(biases, need_db)
    any_dw, any_db = any(d is not None for d in dws), any(d is not None for d in dbs)
    config = config_for(columns, backward=True)
    tiles = triton.cdiv(rows, config.rows)
    block = max(triton.cdiv(tiles, MAX_PARTIALS), 1) * config.rows
    programs = triton.cdiv(rows, block)
    slots = programs + len(route.segments) - 1
    dw_partial = z.new_empty(slots, columns, dtype=torch.float32) if any_dw else None
    db_partial = z.new_empty(slots, columns, dtype=torch.float32) if any_db else None
    bounds = _bounds(route)
    sum_dw = tuple(dws[e] is not None for _, _, e in route.segments)
    sum_db = tuple(dbs[e] is not None for _, _, e in route.segments)
    fused, nothing = config.columns <= FUSED_COLUMNS, (False,) * len(route.segments)
    with torch.cuda.device_of(z):
        if rows:
            norm_backward[(programs,)](
                dy,
                dz,
                z,
                _by_segment(weights, route),
                route.offsets,
                mean,
                rstd,
                dx,
                dw_partial,
                db_partial,
                dy.stride(0),
                0 if dz is None else dz.stride(0),
                z.stride(0),
                rows,
                block,
                BOUNDS=bounds,
                NEED_DW=sum_dw if fused else nothing,
                NEED_DB=sum_db if fused else nothing,
                KEEP_WEIGHT=fused,
                KIND=kind,
                D=columns,
                ROWS=config.rows,
                COLUMNS=config.columns,
                num_warps=config.warps,
            )
        if rows and not fused and (any_dw or any_db):
            norm_weight_grad[(programs, triton.cdiv(columns, WEIGHT_GRAD_COLUMNS))](
                dy,
                z,
                route.offsets,
                mean,
                rstd,
                dw_partial,
                db_partial,
                dy.stride(0),
                z.stride(0),
                rows,
                block,
                BOUNDS=bounds,
                NEED_DW=sum_dw,
                NEED_DB=sum_db,
                D=columns,
                ROWS=WEIGHT_GRAD_ROWS,
                COLUMNS=WEIGHT_GRAD_COLUMNS,
                num_warps=4,
            )
        if any_dw or any_db:
            norm_reduce[(triton.cdiv(columns, REDUCE_COLUMNS), len(weights))](
                dw_partial,
                db_partial,
                tuple(dws),
                tuple(dbs),
                route.offsets,
                block,
                BOUNDS=bounds,
                EXPERTS=tuple(e for _, _, e in route.segments),
                D=columns,
                SLOTS=REDUCE_SLOTS,
                COLUMNS=REDUCE_COLUMNS,
                num_warps=4,
            )
    return dx, dws, dbs


def _shape(x: torch.Tensor) -> tuple[int, int]:
    rows, columns = x.shape
    if columns > MAX_COLUMNS:
        raise NotImplementedError(
            f"routed_norm: rows of at most {MAX_COLUMNS} elements, got {columns}. "
            'Hint: impl="reference" takes any width.'
        )
    return rows, columns


def _unit_stride(x: Optional) -> Optional:
    """Rows may lie apart, the elements of a row may not (gradients of `expand` have stride 0)."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _bounds(route: Route) -> tuple[int, ...]:
    return (*(first for first, _, _ in route.segments), route.segments[-1][1])


def _by_segment(tensors: list[Optional], route: Route) -> tuple[Optional, ...]:
    picked = (tensors[e] for _, _, e in route.segments)
    return tuple(t if t is None else t.contiguous() for t in picked)


def _wanted(like: list[Optional], need: list[bool]) -> list[Optional]:
    wanted = zip(like, need, strict=True)
    return [t.new_empty(t.shape) if want and t is not None else None for t, want in wanted]


def audit_cases() -> list[AuditCase]:
    """Every tile of `config_for` that a model in use meets, three segments, residual and both gradients."""
    cases = []
    for columns, dtype, kind in (
        (192, "bf16", "layer"),  # VLMo tiny
        (544, "fp16", "layer"),  # VLMo base_plus
        (768, "bf16", "layer"),  # VLMo base
        (768, "fp32", "layer"),
        (1408, "bf16", "layer"),  # BEiT-3 giant
        (3072, "bf16", "layer"),  # the inner norm of BEiT-3 base
        (4096, "bf16", "rms"),  # CogVLM
        (6144, "bf16", "layer"),
        (16384, "bf16", "layer"),
        (16384, "bf16", "rms1p"),
    ):
        cases += [_forward_case(columns, dtype, kind), _backward_case(columns, dtype, kind)]
    return [*cases, _weight_grad_case(16384, "bf16"), _reduce_case(768, "bf16")]


_AUDIT_BOUNDS, _AUDIT_SEGMENTS = (0, 1, 3, 4), 3


def _forward_case(columns: int, dtype: str, kind: str) -> AuditCase:
    config = config_for(columns, backward=False)
    per_segment = (f"*{dtype}",) * _AUDIT_SEGMENTS
    data, layer = f"*{dtype}", kind == "layer"
    signature = {
        "x": data,
        "residual": data,
        "weights": per_segment,
        "biases": per_segment if layer else (None,) * _AUDIT_SEGMENTS,
        "offsets": "*i32",
        "y": data,
        "z": data,
        "rstd": "*fp32",
        "x_stride": "i32",
        "residual_stride": "i32",
        "eps": "fp32",
    }
    constants = {"BOUNDS": _AUDIT_BOUNDS, "KIND": kind, "D": columns, "ROWS": config.rows}
    constants["COLUMNS"] = config.columns
    if layer:
        signature["mean"] = "*fp32"
    else:
        constants["mean"] = None
    name = f"routed_norm forward {kind} {dtype} D={columns}"
    strides = ("x_stride", "residual_stride")
    return AuditCase(norm_forward, name, signature, constants, config.warps, 3, divisible=strides)


def _backward_case(columns: int, dtype: str, kind: str) -> AuditCase:
    config = config_for(columns, backward=True)
    data, layer = f"*{dtype}", kind == "layer"
    signature = {
        "dy": data,
        "dz": data,
        "z": data,
        "weights": (data,) * _AUDIT_SEGMENTS,
        "offsets": "*i32",
        "rstd": "*fp32",
        "dx": data,
        "dw_partial": "*fp32",
        "dy_stride": "i32",
        "dz_stride": "i32",
        "z_stride": "i32",
        "rows": "i32",
        "block": "i32",
    }
    constants = {
        "BOUNDS": _AUDIT_BOUNDS,
        "NEED_DW": (config.columns <= FUSED_COLUMNS,) * _AUDIT_SEGMENTS,
        "NEED_DB": (layer and config.columns <= FUSED_COLUMNS,) * _AUDIT_SEGMENTS,
        "KEEP_WEIGHT": config.columns <= FUSED_COLUMNS,
        "KIND": kind,
        "D": columns,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
    }
    for name in ("mean", "db_partial"):
        if layer:
            signature[name] = "*fp32"
        else:
            constants[name] = None
    name = f"routed_norm backward {kind} {dtype} D={columns}"
    strides = ("dy_stride", "dz_stride", "z_stride")
    return AuditCase(norm_backward, name, signature, constants, config.warps, 3, divisible=strides)


def _weight_grad_case(columns: int, dtype: str) -> AuditCase:
    signature = {
        "dy": f"*{dtype}",
        "z": f"*{dtype}",
        "offsets": "*i32",
        "mean": "*fp32",
        "rstd": "*fp32",
        "dw_partial": "*fp32",
        "db_partial": "*fp32",
        "dy_stride": "i32",
        "z_stride": "i32",
        "rows": "i32",
        "block": "i32",
    }
    constants = {
        "BOUNDS": _AUDIT_BOUNDS,
        "NEED_DW": (True,) * _AUDIT_SEGMENTS,
        "NEED_DB": (True,) * _AUDIT_SEGMENTS,
        "D": columns,
        "ROWS": WEIGHT_GRAD_ROWS,
        "COLUMNS": WEIGHT_GRAD_COLUMNS,
    }
    name = f"routed_norm weight gradient {dtype} D={columns}"
    return AuditCase(norm_weight_grad, name, signature, constants, 4, 3, divisible=("dy_stride", "z_stride"))


def _reduce_case(columns: int, dtype: str) -> AuditCase:
    per_expert = (f"*{dtype}",) * _AUDIT_SEGMENTS
    signature = {
        "dw_partial": "*fp32",
        "db_partial": "*fp32",
        "dws": per_expert,
        "dbs": per_expert,
        "offsets": "*i32",
        "block": "i32",
    }
    constants = {
        "BOUNDS": _AUDIT_BOUNDS,
        "EXPERTS": (0, 2, 1),
        "D": columns,
        "SLOTS": REDUCE_SLOTS,
        "COLUMNS": REDUCE_COLUMNS,
    }
    return AuditCase(norm_reduce, f"routed_norm reduce {dtype} D={columns}", signature, constants, 4, 3)
