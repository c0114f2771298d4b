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
def does_not_compile(x):
    tl.store(x, tl.arange(0, 3))


def audit_cases() -> list[AuditCase]:
    tile = {"x": "*fp32", "out": "*fp32"}
    spill = AuditCase(hoards_registers, "spills", tile, {"SIZE": 8192}, num_warps=1, num_stages=1)
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
        _product("small tile on purpose", 16, 64)._replace(wgmma=False),
        _product("too much shared memory", 256, 256, stages=4, warps=8),
        AuditCase(does_not_compile, "does not compile", {"x": "*fp32"}, {}, 4, 1),
    ]


def _product(name: str, m: int, n: int, stages: int = 3, warps: int = 4) -> AuditCase:
    signature = {"a": "*bf16", "b": "*bf16", "out": "*bf16", "steps": "i32"}
    return AuditCase(product, name, signature, {"M": m, "N": n, "K": 64}, warps, stages)
