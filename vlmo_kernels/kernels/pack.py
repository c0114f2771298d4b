"""Row gather: pack and unpack, and the gradient of each, which is the other's gather."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime.audit_case import AuditCase


class Config(NamedTuple):
    """Tile of one program, and its warps."""

    rows: int
    columns: int
    warps: int


def config_for(columns: int) -> Config:
    """4096 elements a program: 32 a thread, so that 64 bytes a thread are in flight in 16 bits."""
    width = min(triton.next_power_of_2(max(columns, 1)), 1024)
    return Config(rows=max(1, min(4096 // width, 64)), columns=width, warps=4)


@triton.jit(do_not_specialize=["rows"])
def _gather_kernel(
    source,  # [S, D]
    index,  # int32 [rows]
    out,  # [rows, D], contiguous
    stride,  # elements from one row of `source` to the next
    rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < rows
    # a row index times the row length passes 2^31 at 2.8 million rows of 768: 64-bit from here on
    chosen = tl.load(index + row, mask=inside, other=-1).to(tl.int64)
    wanted = (chosen >= 0)[:, None] & (column < D)[None, :]
    values = tl.load(source + chosen[:, None] * stride + column[None, :], mask=wanted, other=0)
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out + at, values, mask=inside[:, None] & (column < D)[None, :])


def gather_rows(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`out[i] = source[index[i]]`, zeros where the index is -1.

    Args:
        source: `[S, D]`, any dtype, rows may be strided.
        index: int32 `[R]` on the same device, values from -1 to S - 1.

    Returns:
        `[R, D]`, contiguous, dtype of `source`.
    """
    if source.stride(-1) != 1:
        source = source.contiguous()
    rows, columns = index.shape[0], source.shape[1]
    out = source.new_empty(rows, columns)
    if out.numel() == 0:
        return out
    config = config_for(columns)
    grid = (triton.cdiv(rows, config.rows), triton.cdiv(columns, config.columns))
    with torch.cuda.device_of(source):
        _gather_kernel[grid](
            source,
            index,
            out,
            source.stride(0),
            rows,
            D=columns,
            ROWS=config.rows,
            COLUMNS=config.columns,
            num_warps=config.warps,
        )
    return out


def audit_cases() -> list[AuditCase]:
    """The shapes of VLMo base (768), base_plus (544) and a wide model, in 16 and 32 bits."""
    cases = []
    for columns, dtype in ((768, "bf16"), (544, "fp16"), (4096, "fp32")):
        config = config_for(columns)
        cases.append(
            AuditCase(
                kernel=_gather_kernel,
                name=f"gather_rows {dtype} D={columns}",
                signature={
                    "source": f"*{dtype}",
                    "index": "*i32",
                    "out": f"*{dtype}",
                    "stride": "i32",
                    "rows": "i32",
                },
                constants={"D": columns, "ROWS": config.rows, "COLUMNS": config.columns},
                num_warps=config.warps,
                num_stages=3,
                divisible=("stride",),
            )
        )
    return cases
