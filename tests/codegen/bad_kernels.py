"""Kernels that break one limit of the codegen audit each, and one that breaks none."""

from __future__ import annotations

import triton
import triton.language as tl

from vlmo_kernels.runtime.audit_case import AuditCase


@triton.jit
def hoards_registers(x, out, SIZE: tl.constexpr):
    """Two tiles that are both alive across a reduction."""
    at = tl.arange(0, SIZE)
    a = tl.load(x + at)
    b = tl.load(x + SIZE + at)
    total = tl.sum(a * b, 0)
    tl.store(out + at, a * total + b)
    tl.store(out + SIZE + at, b * total + a)


@triton.jit
def product(a, b, out, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for step in range(tl.maximum(steps, 1)):
        k = step * K + inner
        left = tl.load(a + row[:, None] * 4096 + k[None, :])
        right = tl.load(b + k[:, None] * 4096 + column[None, :])
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(out + row[:, None] * N + column[None, :], total.to(tl.bfloat16))


@triton.jit
def gathers(rows, a, b, out, M: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr):
    """Row ids loaded in the step that uses them, as int64."""
    row, inner = tl.arange(0, M), tl.arange(0, K)
    left = tl.load(a + row[:, None] * K + inner[None, :])
    total = tl.zeros((M, M), tl.float32)
    for step in range(STEPS):
        at = tl.load(rows + step * M + row).to(tl.int64)
        right = tl.load(b + at[:, None] * K + inner[None, :])
        total = tl.dot(left, right.T, total, input_precision="ieee")
    tl.store(out + row[:, None] * M + row[None, :], total.to(tl.bfloat16))


@triton.jit
def waits_for_every_tile(A, B, out, M: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr):
    """Through tensor descriptors: a barrier is waited on in either case, but one stage loads nothing ahead."""
    row = tl.arange(0, M)
    total = tl.zeros((M, M), tl.float32)
    for step in tl.range(0, 16, num_stages=STAGES):
        left, right = A.load([0, step * K]), B.load([0, step * K])
        total = tl.dot(left, right.T, total, input_precision="ieee")
    tl.store(out + row[:, None] * M + row[None, :], total.to(tl.bfloat16))


@triton.jit
def does_not_compile(x):
    tl.store(x, tl.arange(0, 3))


def audit_cases() -> list[AuditCase]:
    tile = {"x": "*fp32", "out": "*fp32"}
    spill = AuditCase(hoards_registers, "spills", tile, {"SIZE": 8192}, num_warps=1, num_stages=1)
    constants = {"M": 64, "K": 64, "STEPS": 16}
    types = {"rows": "*i32", "a": "*bf16", "b": "*bf16", "out": "*bf16"}
    gather = AuditCase(gathers, "gathers", types, constants, num_warps=4, num_stages=3)
    types = {"A": "tensordesc<bf16[64, 64]>", "B": "tensordesc<bf16[64, 64]>", "out": "*bf16"}
    tma = AuditCase(waits_for_every_tile, "TMA", types, {"M": 64, "K": 64, "STAGES": 3}, num_warps=4, num_stages=3)
    return [
        spill,
        spill._replace(name="may spill", allowed_spill=1 << 20, reason="shows that it may"),
        spill._replace(name="may spill without a reason", allowed_spill=1 << 20),
        spill._replace(name="does not spill", num_warps=8),
        # 256 accumulators a thread leave no register for the rest: ptxas serialises wgmma (C7511)
        _product("serialised", 128, 256, warps=4)._replace(
            allowed_spill=1 << 20, reason="not what is tested"
        ),
        _product("not serialised", 128, 256, warps=8),
        _product("tile too small for wgmma", 16, 64),
        _product("small tile on purpose", 16, 64)._replace(wgmma=False, reason="shows that it may"),
        _product("small tile without a reason", 16, 64)._replace(wgmma=False),
        _product("too much shared memory", 256, 256, stages=4, warps=8),
        _product("one fits an SM", 128, 128, stages=4, warps=8)._replace(blocks=2, maxnreg=128),
        _product("two fit an SM", 128, 128, warps=8)._replace(blocks=2, maxnreg=128),
        _product("too many registers for two", 128, 256, stages=1, warps=8)._replace(blocks=2),
        gather,
        gather._replace(name="gathers on purpose", pipelined=False, reason="shows that it may"),
        tma._replace(name="TMA without a pipeline", constants={"M": 64, "K": 64, "STAGES": 1}),
        tma,
        AuditCase(does_not_compile, "does not compile", {"x": "*fp32"}, {}, 4, 1),
    ]


def _product(name: str, m: int, n: int, stages: int = 3, warps: int = 4) -> AuditCase:
    signature = {"a": "*bf16", "b": "*bf16", "out": "*bf16", "steps": "i32"}
    return AuditCase(product, name, signature, {"M": m, "N": n, "K": 64}, warps, stages)
