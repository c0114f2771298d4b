"""One kernel in one shipped configuration, as the codegen audit compiles it."""

from __future__ import annotations

from typing import Any, NamedTuple


class AuditCase(NamedTuple):
    """What `triton.compile` needs to know, and what the compiled code may cost.

    Attributes:
        kernel: the `@triton.jit` function.
        name: names the configuration in the table, for example `routed_norm fwd bf16 D=768`.
        signature: Triton type of every argument that is no constant: `{"x": "*bf16", "rows": "i32"}`; an
            argument that is a tuple has a tuple of types. Pointers are taken to be 16-byte aligned.
        constants: value of every constexpr; None for an optional pointer that is not given.
        num_warps: warps of one program.
        num_stages: pipeline depth.
        allowed_spill: bytes of spill stores plus loads that are accepted.
        reason: why an exception (a spill, no pipeline, no wgmma) is accepted; required where one is.
        maxnreg: register cap the launcher asks for, or None.
        divisible: integer arguments the launcher lets Triton specialise as multiples of 16 (strides).
        archs: compute capabilities that ship this kernel.
        wgmma: False where tiles are too small for the matrix instructions of sm_90 (HGMMA) and sm_100 (UTCHMMA).
        pipelined: False where a loop of tl.dot with three stages or more need not load ahead.
        blocks: programs meant to share an SM.
    """

    kernel: Any
    name: str
    signature: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    allowed_spill: int = 0
    reason: str = ""
    maxnreg: int | None = None
    divisible: tuple[str, ...] = ()
    archs: tuple[int, ...] = (80, 90, 100, 120)
    wgmma: bool = True
    pipelined: bool = True
    blocks: int = 1
