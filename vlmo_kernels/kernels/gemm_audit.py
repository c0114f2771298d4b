"""What the codegen audit compiles of the routed GEMM and its gradients: every shipped configuration."""

from __future__ import annotations

from typing import Any

import torch

from vlmo_kernels.runtime.audit_case import AuditCase

from . import bias_grad, inner_norm
from .gemm import Config, config_for, gemm_kernel
from .gemm_grad import (
    REDUCE_COLUMNS,
    input_config_for,
    input_grad_kernel,
    reduce_weight_grad_kernel,
    weight_config_for,
    weight_grad_kernel,
)

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ARCHS = (80, 90, 100, 120)
ROUTE = dict(GROUPS=(0, 2, 2, 3, 3, 4), SEGMENTS=3)  # three experts, four groups
MANY = 13888  # rows: 64 pairs of VLMo-Base
FEW = 512


def audit_cases() -> list[AuditCase]:
    cases: list[AuditCase] = []
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype, rows, tma in ((bf16, MANY, False), (bf16, FEW, False), (fp32, MANY, False), (bf16, MANY, True)):
        cases += _gemm("fc1 gelu", dtype, rows, 768, 3072, bias=True, activation="gelu", save=True, tma=tma)
        cases += _gemm("fc1 swiglu", dtype, rows, 1024, 2816, activation="silu", gated=True, save=True, tma=tma)
        cases += _gemm("fc2", dtype, rows, 3072, 768, bias=True, gamma="fp32", residual="fp32", tma=tma)
        cases += _input_grad("fc2 gelu", dtype, rows, 768, 3072, activation="gelu", tma=tma)
        cases += _input_grad("fc2 swiglu", dtype, rows, 1024, 2816, activation="silu", gated=True, tma=tma)
        cases += _input_grad("fc1", dtype, rows, 3072, 768, tma=tma)
        cases += _input_grad("fc1 swiglu", dtype, rows, 2816, 1024, second=True, tma=tma)
    for dtype in (bf16, fp32):
        cases += _weight_grad("fc1", dtype, 3072, 768, partial=False)
        cases += _weight_grad("fc1 split", dtype, 3072, 768, partial=True)
        cases += _inner_norm(dtype)
    # fp16 differs from bf16 in its conversions alone: the two largest epilogues
    cases += _gemm("fc1 swiglu", fp16, MANY, 1024, 2816, activation="silu", gated=True, save=True)
    cases += _input_grad("fc2 swiglu", fp16, MANY, 1024, 2816, activation="silu", gated=True)
    # widths that the tile does not divide, and a contraction with a tail
    cases += _gemm("fc1 gelu", bf16, MANY, 544, 2176, bias=True, activation="gelu", save=True)
    cases += _gemm("odd", bf16, MANY, 34, 50, bias=True, divisible=())
    cases += _gemm("fc1 gelu_tanh", bf16, MANY, 768, 3072, bias=True, activation="gelu_tanh", save=True)
    cases += _input_grad("fc2 gelu", bf16, MANY, 544, 2176, activation="gelu")
    cases += _input_grad("odd", bf16, MANY, 50, 34, divisible=())
    cases += _weight_grad("odd", bf16, 50, 34, partial=False, divisible=())
    cases += _gemm("fc1 tf32", fp32, MANY, 768, 3072, bias=True, activation="gelu", precision="tf32")
    cases += _input_grad("fc1 tf32", fp32, MANY, 3072, 768, precision="tf32")
    cases += _weight_grad("fc1 tf32", fp32, 3072, 768, partial=True, precision="tf32")
    # through descriptors, which no heuristic takes and `tune` tries in 16 bits (IEEE fp32 spills 656 bytes so)
    cases += _gemm("fc1 gelu", bf16, FEW, 768, 3072, bias=True, activation="gelu", save=True, tma=True)
    cases += _gemm("fc1 swiglu", fp16, MANY, 1024, 2816, activation="silu", gated=True, save=True, tma=True)
    cases += _gemm("fc1 gelu", bf16, MANY, 544, 2176, bias=True, activation="gelu", save=True, tma=True)
    cases += _input_grad("fc2 gelu", bf16, MANY, 544, 2176, activation="gelu", tma=True)
    cases += _gemm("fc1 tf32", fp32, MANY, 768, 3072, bias=True, activation="gelu", precision="tf32", tma=True)
    cases += _input_grad("fc1 tf32", fp32, MANY, 3072, 768, precision="tf32", tma=True)
    return cases + _reductions()


UNALIGNED = "rows that start at 2 bytes travel through registers"
NEWEST = "Triton 3.9, 128 registers for two blocks an SM"  # with Triton 3.6 nothing is spilled


def _configs(choose, tma: bool = False) -> list[tuple[Config, tuple[int, ...]]]:
    """Every configuration, with the architectures that use it; `tma`: the same through descriptors, where there are."""
    by_config: dict[Config, list[int]] = {}
    for arch in ARCHS:
        if arch >= 90 or not tma:
            by_config.setdefault(choose((arch // 10, arch % 10))._replace(tma=tma), []).append(arch)
    return [(c, tuple(archs)) for c, archs in by_config.items()]


def _boxes(
    c: Config, kind: str, operands: tuple[str, ...], weights: tuple[str, ...], weight_box: tuple[int, int]
) -> dict[str, str | None]:
    """Types of the descriptors, and of the pointers whose place they take."""
    types: dict[str, str | None] = dict.fromkeys(w + i for w in "WU" for i in "0123")
    if c.tma:
        rows, columns = weight_box
        types |= dict(W=None, W_UP=None)
        types |= {name: f"tensordesc<{kind}[{c.bm}, {c.bk}]>" for name in operands}
        types |= {w + i: f"tensordesc<{kind}[{rows}, {columns}]>" for w in weights for i in "012"}  # three segments
    return types


def _limits(c: Config) -> dict[str, int | None]:
    """A cap on registers is for a second block on the SM."""
    return dict(maxnreg=c.maxnreg, blocks=2 if c.maxnreg else 1)


def _unaligned(divisible: tuple[str, ...]) -> dict[str, Any]:
    return {} if divisible else dict(pipelined=False, reason=UNALIGNED)


def _tile(c: Config, epilogue: bool = True) -> dict[str, int]:
    return dict(BM=c.bm, BN=c.bn, BK=c.bk) | (dict(PARTS=c.parts, TMA=c.tma) if epilogue else {})


def _gemm(
    name, dtype, rows, k, n, bias=False, activation="none", gated=False, gamma=None, residual=None, save=False,
    precision="ieee", divisible=("stride_x", "stride_residual"), tma=False,
):  # fmt: skip
    t = "*" + TYPES[dtype]
    up = (t,) * 3 if gated else None
    signature = dict(
        X=t, W=(t,) * 3, BIAS=(t,) * 3 if bias else None, W_UP=up, BIAS_UP=up if bias else None,
        GAMMA=gamma and ("*" + gamma,) * 3, ROW_SCALE=gamma and "*fp32", RESIDUAL=residual and "*" + residual,
        Y="*" + (residual or TYPES[dtype]), PRE=t if save else None, UP=t if save and gated else None,
        OFFSETS="*i32", stride_x="i32", stride_residual="i32",
    )  # fmt: skip
    constants = dict(
        N=n, K=k, **ROUTE, BIAS_MASK=7 * bias, BIAS_UP_MASK=7 * (bias and gated), GAMMA_MASK=7 if gamma else 0,
        ACTIVATION=activation, IS_GATED=gated, SAVE=save, HAS_ROW_SCALE=gamma is not None,
        HAS_RESIDUAL=residual is not None, EXACT=dtype == torch.float32, PRECISION=precision,
    )  # fmt: skip
    title = f"gemm {name} {TYPES[dtype]} K={k} N={n}"
    return [
        AuditCase(
            gemm_kernel, f"{title} {c.bm}x{c.bn}{' tma' * c.tma}",
            signature | _boxes(c, TYPES[dtype], ("X",), ("W", "U") if gated else ("W",), (c.bn, c.bk)),
            constants | _tile(c), c.warps, c.stages,
            divisible=divisible, archs=archs, **_limits(c), **_unaligned(divisible),
        )
        for c, archs in _configs(lambda capability: config_for(dtype, rows, gated, capability), tma)
    ]  # fmt: skip


def _input_grad(
    name, dtype, rows, k, n, activation="none", gated=False, second=False, precision="ieee",
    divisible=("stride_dy", "stride_dy_up"), tma=False,
):  # fmt: skip
    t = "*" + TYPES[dtype]
    inner = activation != "none"
    signature = dict(
        DY=t, W=(t,) * 3, DY_UP=t if second else None, W_UP=(t,) * 3 if second else None,
        ROW_SCALE="*fp32" if inner else None, PRE=t if inner else None, UP=t if gated else None, DX=t,
        DX_UP=t if gated else None, H=t if inner else None, DB="*fp32" if inner else None,
        DB_UP="*fp32" if gated else None, OFFSETS="*i32", T="i32", stride_dy="i32", stride_dy_up="i32",
    )  # fmt: skip
    constants = dict(
        N=n, K=k, **ROUTE, GROUPS_TOTAL=4, ACTIVATION=activation, IS_GATED=gated, HAS_SECOND=second,
        HAS_ROW_SCALE=inner, SAVE_H=inner, SAVE_DB=inner, ZERO_TAIL=not inner, EXACT=dtype == torch.float32,
        PRECISION=precision,
    )  # fmt: skip
    title = f"input grad {name} {TYPES[dtype]} K={k} N={n}"
    return [
        AuditCase(
            input_grad_kernel, f"{title} {c.bm}x{c.bn}{' tma' * c.tma}",
            signature | _boxes(c, TYPES[dtype], ("DY", "DY_UP")[: 1 + second], ("W", "U")[: 1 + second], (c.bk, c.bn)),
            constants | _tile(c), c.warps, c.stages,
            divisible=divisible, archs=archs, **_limits(c), **_unaligned(divisible),
            **dict(allowed_spill=24 if c.tma else 16, reason=NEWEST) if inner and c.maxnreg else {},
        )
        for c, archs in _configs(lambda capability: input_config_for(dtype, rows, inner, gated, capability), tma)
    ]  # fmt: skip


def _weight_grad(name, dtype, n, k, partial, precision="ieee", divisible=("stride_dy", "stride_x")):
    t = "*" + TYPES[dtype]
    signature = dict(
        DY=t, X=t, DW=(t,) * 3, PARTIAL="*fp32" if partial else None, OFFSETS="*i32", stride_dy="i32", stride_x="i32"
    )
    constants = dict(N=n, K=k, **ROUTE, SPLITS=2 if partial else 1, TO_PARTIAL=partial, PRECISION=precision)
    return [
        AuditCase(
            weight_grad_kernel, f"weight grad {name} {TYPES[dtype]} N={n} K={k} {c.bm}x{c.bn}", signature,
            constants | _tile(c, False), c.warps, c.stages, divisible=divisible, archs=archs,
        )
        for c, archs in _configs(lambda capability: weight_config_for(dtype, bool(divisible), capability))
    ]  # fmt: skip


def _reductions() -> list[AuditCase]:
    vectors = ("*bf16",) * 3
    return [
        AuditCase(
            reduce_weight_grad_kernel, "reduce weight grad K=3072",
            dict(PARTIAL="*fp32", W=vectors, GAMMA=("*fp32",) * 3, DW=vectors, DOT="*fp32"),
            dict(N=768, K=3072, FIRST_PART=(0, 2, 4, 6), IDS=(0, 1, 2), EXPERTS=3, GAMMA_MASK=7, DW_MASK=7,
                 SAVE_DOT=True, BK=REDUCE_COLUMNS),
            num_warps=4, num_stages=3,
        ),
        AuditCase(
            bias_grad.column_sums_kernel, "column sums",
            dict(X="*bf16", ROW_SCALE="*fp32", PARTIAL="*fp32", OFFSETS="*i32", stride_x="i32"),
            dict(N=768, **ROUTE, HAS_ROW_SCALE=True, BM=bias_grad.TILE_ROWS, BN=bias_grad.TILE_COLUMNS),
            num_warps=4, num_stages=3, divisible=("stride_x",),
        ),
        AuditCase(
            bias_grad.bias_grad_kernel, "bias grad",
            dict(PARTIAL="*fp32", OFFSETS="*i32", DB=vectors, DGAMMA=("*fp32",) * 3, GAMMA=("*fp32",) * 3,
                 BIAS=vectors, DOT="*fp32"),
            dict(N=768, **ROUTE, SLOTS=(0, 1, 2), IDS=(0, 1, 2), EXPERTS=3, DB_MASK=7, DGAMMA_MASK=7,
                 GAMMA_MASK=7, BIAS_MASK=7, BM=128, BR=bias_grad.REDUCE_ROWS, BN=bias_grad.REDUCE_COLUMNS),
            num_warps=4, num_stages=3,
        ),
    ]  # fmt: skip


def _inner_norm(dtype: torch.dtype) -> list[AuditCase]:
    t, name = "*" + TYPES[dtype], TYPES[dtype]
    affine = dict(WEIGHT=(t,) * 3, BIAS=(t,) * 3)
    n = dict(N=6144, **ROUTE)
    masks = dict(GROUPS_TOTAL=4, WEIGHT_MASK=7, BIAS_MASK=7, BN=inner_norm.BLOCK)
    act = dict(ACTIVATION="gelu", IS_GATED=False, EXACT=dtype == torch.float32)
    return [
        AuditCase(
            inner_norm.inner_norm_kernel, f"inner norm {name}",
            dict(H=t, **affine, OUT=t, OFFSETS="*i32", eps="fp32"), n | masks, num_warps=4, num_stages=3,
        ),
        AuditCase(
            inner_norm.inner_norm_grad_kernel, f"inner norm grad {name}",
            dict(DOUT=t, PRE=t, UP=None, **affine, ROW_SCALE="*fp32", DPRE=t, DUP=None, OUT=t, MEAN="*fp32",
                 RSTD="*fp32", OFFSETS="*i32", eps="fp32"),
            n | masks | act | dict(HAS_ROW_SCALE=True), num_warps=4, num_stages=3,
        ),
        AuditCase(
            inner_norm.inner_norm_sums_kernel, f"inner norm sums {name}",
            dict(DOUT=t, PRE=t, UP=None, MEAN="*fp32", RSTD="*fp32", DWEIGHT="*fp32", DBIAS="*fp32",
                 OFFSETS="*i32"),
            n | act | dict(BM=bias_grad.TILE_ROWS, BN=bias_grad.TILE_COLUMNS), num_warps=4, num_stages=3,
        ),
    ]  # fmt: skip
