"""Triton launchers of `shared_attention`; its contract is in reference/shared_attention.py.

The forward is one launch. The backward is two (dq, then dk and dv) or, for short samples, one; a bias
gradient adds a fill and two. Grids come from T, B and max_seqlen alone, so nothing waits for the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton

from ..tuning import tables
from .attention_bwd import (
    attention_dbias_kernel,
    attention_dkdv_kernel,
    attention_dq_kernel,
    attention_short_bwd_kernel,
    row_of_position_kernel,
)
from .attention_fwd import attention_fwd_kernel

LOG2E = 1.4426950408889634
MAX_HEAD_DIM = 256  # the largest of the tables below
Optional = torch.Tensor | None


class Config(NamedTuple):
    """Rows of a query tile, rows of a key tile, warps, and stages of the pipelined loop."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# By kernel and padded head dimension (64 stands for less), 16-bit inputs on sm_90 and sm_100, whose matrix
# units read shared memory. A larger tile spills in its dearest variant (bias, causal, prefix). dkdv at 256
# is the one whose tiles are below the 64 rows of a wgmma: with 64 keys 192 to 292 bytes spill. dkdv at 128: with 128
# keys grouped queries spill on sm_100, and with a bias Triton 3.6 does not compile it.
_HOPPER = {
    "fwd": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    "dq": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 16, 8, 2)},
    "dkdv": {64: (64, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    "short": {64: (256, 32, 8, 2), 128: (128, 32, 8, 2)},
    "dbias": {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
}
# sm_100: five products of 256 queries leave tensor memory through registers, and with a mask 404 to 1124 bytes spill.
_BLACKWELL = _HOPPER | {"short": {64: (128, 32, 8, 2), 128: (64, 32, 4, 2)}}
# The same on all other parts: operands pass through registers, and shared memory may be 99 KiB.
_OTHER = {
    "fwd": {64: (128, 32, 8, 2), 128: (64, 32, 8, 2), 256: (64, 16, 8, 2)},
    "dq": {64: (128, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 8, 2)},
    "dkdv": {64: (32, 128, 8, 1), 128: (32, 64, 8, 2), 256: (16, 32, 8, 2)},
    "short": {64: (128, 32, 8, 2)},
    "dbias": {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 1)},
}
# fp32: operands take twice the room, and without tensor cores (IEEE) a tile's products sit in registers.
_FP32 = {
    "fwd": {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
    "dq": {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (32, 32, 8, 1)},
    "dkdv": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    "short": {64: (64, 16, 8, 1)},
    "dbias": {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 4, 1)},
}
# 16 bits with a head_dim that 4 does not divide (34 in VLMo base_plus): rows travel 4 bytes at a time, through
# registers. Better to pad the heads in the QKV weight: 34 to 40.
_UNALIGNED = {
    9: {"dkdv": {64: (64, 64, 8, 2)}, "short": {64: (256, 16, 8, 2)}},
    10: {"dkdv": {64: (64, 64, 8, 2)}},
}
_UNALIGNED_OTHER = {"dq": {64: (128, 16, 8, 2)}, "dkdv": {64: (32, 64, 8, 1)}, "dbias": {64: (64, 32, 8, 1)}}
_FP32_OTHER = _FP32 | {"dq": {**_FP32["dq"], 256: (16, 16, 8, 1)}}  # 32 x 32 needs 132 KiB


def padded_head_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _entry(kernel: str, itemsize: int, head_dim: int, arch: int) -> tuple[int, ...] | None:
    family = arch // 10
    if itemsize == 4:
        table = _FP32 if family in (9, 10) or arch == 80 else _FP32_OTHER
    else:
        table = {9: _HOPPER, 10: _BLACKWELL}.get(family, _OTHER)
    bucket = max(padded_head_dim(head_dim), 64)
    if itemsize == 2 and head_dim % 4:  # rows of 4-byte pieces
        tiles = _UNALIGNED.get(family, _UNALIGNED_OTHER)
        table = table | {name: {**table[name], **row} for name, row in tiles.items()}
    return table[kernel].get(bucket)


def config_for(kernel: str, itemsize: int, head_dim: int, max_seqlen: int, *, bias: bool, arch: int) -> Config | None:
    """The configuration of `"fwd" | "dq" | "dkdv" | "short" | "dbias"`; None where the kernel has none.

    `max_seqlen` counts only by bucket: lengths change from batch to batch, configurations are compiled. `arch`: 90 for
    compute capability 9.0.
    """
    entry = _entry(kernel, itemsize, head_dim, arch)
    if entry is None:
        return None
    config = Config(*entry)
    if kernel == "dbias":  # its tiles are of positions, whose number is the model's, not the batch's
        return config
    if kernel == "short":
        if max_seqlen > config.block_m:
            return None
        rows = min(config.block_m, 64 if max_seqlen <= 64 else 128 if max_seqlen <= 128 else 256)
        return config._replace(block_m=rows)
    if kernel == "dkdv" and bias:
        if config.block_m == 64:
            # 64 x 128 spills 24 bytes with a bias and a causal mask; 32 x 64 of head_dim 34 does not compile for sm_100
            config = config._replace(block_m=32, block_n=128)
    if kernel == "fwd" and max_seqlen <= 64 and config.block_m > 64:  # text only: half of 128 rows would idle
        return config._replace(block_m=64, warps=4 if head_dim <= 64 else 8)
    return config


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqs,
    bias: Optional,
    causal: bool,
    prefix: Optional,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.shared_attention.forward`; dead rows of both results are left unset."""
    tokens, heads, head_dim = q.shape
    if head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"shared_attention: heads of at most {MAX_HEAD_DIM} elements, got {head_dim}. "
            'Hint: impl="reference" takes any width.'
        )
    batch = seqs.cu_seqlens.shape[0] - 1
    o = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if tokens == 0 or batch == 0:
        return o, lse
    q, k, v = (_rows_contiguous(t) for t in (q, k, v))
    bias = None if bias is None else _rows_contiguous(bias)
    config = _config("fwd", q, seqs, bias, causal)
    tiles, tiles_per_sample = _tiles(tokens, batch, seqs.max_seqlen, config.block_m)
    align, strides = _strides(q, k, v)
    with torch.cuda.device_of(q):
        attention_fwd_kernel[(tiles * heads,)](
            q, k, v, o, lse, seqs.cu_seqlens, seqs.rows, seqs.positions, bias, _prefix(causal, prefix),
            _score_scale(scale, q, bias), batch, tokens, tiles_per_sample, *strides, *_bias_strides(bias),
            HAS_BIAS=bias is not None,
            NATURAL=_natural(q.dtype, bias is not None),
            **_constants(q, k, bias, align, causal, prefix),
            **_launch(config),
        )  # fmt: skip
    return o, lse


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    seqs,
    bias: Optional,
    causal: bool,
    prefix: Optional,
    scale: float,
    need_dbias: bool,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> Optional:
    """See `reference.shared_attention.backward`."""
    tokens, heads, head_dim = q.shape
    batch = seqs.cu_seqlens.shape[0] - 1
    if tokens == 0 or batch == 0:
        for grad in out:
            grad.zero_()
        return torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device) if need_dbias else None
    q, k, v = (_rows_contiguous(t) for t in (q, k, v))
    do, o, lse = do.contiguous(), o.contiguous(), lse.contiguous()
    bias = None if bias is None else _rows_contiguous(bias)
    # The kernels need unit stride in the last dimension; a caller's other layout is served by a copy.
    grads = tuple(t if _unit_stride(t) else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in out)
    delta = torch.empty_like(lse)
    align, strides = _strides(q, k, v, *grads)
    constants = _constants(q, k, bias, align, causal, prefix)
    tables = (seqs.cu_seqlens, seqs.rows, seqs.positions, bias, _prefix(causal, prefix))
    factors = (scale, _score_scale(scale, q, bias), batch, tokens)
    short = _config("short", q, seqs, bias, causal) if k.shape[1] == heads else None
    dbias = None
    with torch.cuda.device_of(q):
        if short is not None:
            attention_short_bwd_kernel[(batch * heads,)](
                q, k, v, o, do, lse, delta, *grads, *tables, *factors, *strides, *_bias_strides(bias),
                HAS_BIAS=bias is not None,
                NATURAL=_natural(q.dtype, bias is not None),
                **{name: value for name, value in constants.items() if name != "GROUP"},
                **_launch(short),
            )  # fmt: skip
        else:
            config = _config("dq", q, seqs, bias, causal)
            tiles, per_sample = _tiles(tokens, batch, seqs.max_seqlen, config.block_m)
            attention_dq_kernel[(tiles * heads,)](
                q, k, v, o, do, lse, delta, *grads, *tables, *factors, per_sample,
                *strides, *_bias_strides(bias),
                HAS_BIAS=bias is not None,
                NATURAL=_natural(q.dtype, bias is not None),
                **constants,
                **_launch(config),
            )  # fmt: skip
            config = _config("dkdv", q, seqs, bias, causal)
            tiles, per_sample = _tiles(tokens, batch, seqs.max_seqlen, config.block_n)
            attention_dkdv_kernel[(tiles * k.shape[1],)](
                q, k, v, do, lse, delta, *grads[1:], *tables, *factors, per_sample,
                *strides[:6], *strides[8:], *_bias_strides(bias),
                HAS_BIAS=bias is not None,
                NATURAL=_natural(q.dtype, bias is not None),
                **constants,
                **_launch(config),
            )  # fmt: skip
        if need_dbias:
            dbias = _bias_gradient(q, k, v, do, lse, delta, seqs, bias, causal, prefix, scale)
    for given, grad in zip(out, grads, strict=True):
        if given is not grad:
            given.copy_(grad)
    return dbias


def _bias_gradient(q, k, v, do, lse, delta, seqs, bias, causal, prefix, scale) -> torch.Tensor:
    tokens, heads, head_dim = q.shape
    batch, length = seqs.cu_seqlens.shape[0] - 1, bias.shape[-1]
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    if length == 0:
        return dbias
    inverse = torch.full((batch, length), -1, dtype=torch.int32, device=q.device)
    row_of_position_kernel[(batch,)](inverse, seqs.cu_seqlens, seqs.rows, seqs.positions, length, BLOCK=256)
    config = _config("dbias", q, seqs, bias, causal)
    align, strides = _strides(q, k, v)
    tiles = triton.cdiv(length, config.block_m) * triton.cdiv(length, config.block_n)
    attention_dbias_kernel[(tiles * heads,)](
        q, k, v, do, lse, delta, dbias, inverse, bias, _prefix(causal, prefix),
        scale, batch, tokens, length, *strides, *_bias_strides(bias),
        **_constants(q, k, bias, align, causal, prefix),
        **_launch(config),
    )  # fmt: skip
    return dbias


def problem(
    kernel: str, dtype: torch.dtype, max_seqlen: int, head_dim: int, bias: bool, causal: bool
) -> tables.Problem:
    """One of the kernels of `config_for` in the tables: sizes max_seqlen and head_dim, in the order of `Config`."""
    masks = " bias" * bias + " causal" * causal
    return tables.Problem(f"attention {kernel}{masks}", dtype, (max_seqlen, head_dim))


def problems(call: dict[str, Any], dtype: torch.dtype) -> list[tables.Problem]:
    """The launches of a call of the public op that the tables know, forward and backward."""
    q, length, bias = call["q"], call["layout"].max_seqlen, call["bias"] is not None
    kernels = ("fwd", "dq", "dkdv", "short") + ("dbias",) * bias
    return [problem(name, dtype, length, q.shape[-1], bias, call["causal"]) for name in kernels]


def _config(kernel: str, q: torch.Tensor, seqs, bias: Optional, causal: bool) -> Config | None:
    """The measured configuration, else that of the heuristics. None ("long" in a table): the kernel is not taken."""
    sizes = dict(head_dim=q.shape[-1], max_seqlen=seqs.max_seqlen, bias=bias is not None)
    choice = tables.find(problem(kernel, q.dtype, causal=causal, **sizes), q.device)
    if choice is not None:
        if choice.config == tables.LONG:
            return None
        config = Config(*choice.config)
        if kernel != "short" or seqs.max_seqlen <= config.block_m:
            return config
    return config_for(kernel, q.element_size(), arch=_architecture(q.device), **sizes)


def _architecture(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _unit_stride(t: torch.Tensor) -> bool:
    return t.stride(-1) == 1


def _rows_contiguous(t: torch.Tensor) -> torch.Tensor:
    return t if _unit_stride(t) else t.contiguous()


def _tiles(tokens: int, batch: int, max_seqlen: int, block: int) -> tuple[int, int]:
    """Number of tiles and tiles per sample, 0 where samples own tiles by length (`locate_tile`)."""
    per_sample = max(triton.cdiv(max_seqlen, block), 1)
    by_length = tokens // block + batch
    return (batch * per_sample, per_sample) if batch * per_sample <= by_length else (by_length, 0)


def _strides(*tensors: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """Greatest common power of two (at most 16) of all token and head strides, and the strides over it."""
    strides = [s for t in tensors for s in t.stride()[:2]]
    align = math.gcd(16, *strides)
    return align, tuple(s // align for s in strides)


def _bias_strides(bias: Optional) -> tuple[int, int]:
    return (0, 0) if bias is None else bias.stride()[:2]


def _prefix(causal: bool, prefix: Optional) -> Optional:
    return prefix if causal else None


def _natural(dtype: torch.dtype, has_bias: bool) -> bool:
    """The units of the scores, see attention_fwd.py."""
    return has_bias or dtype == torch.float32


def _score_scale(scale: float, q: torch.Tensor, bias: Optional) -> float:
    return scale if _natural(q.dtype, bias is not None) else scale * LOG2E


def _constants(q, k, bias: Optional, align: int, causal: bool, prefix: Optional) -> dict:
    _, heads, head_dim = q.shape
    exact = q.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return dict(
        H=heads, GROUP=heads // k.shape[1], DH=head_dim, DHP=padded_head_dim(head_dim), ALIGN=align,
        WIDE_BIAS=bias is not None and bias.shape[1] * bias.stride(1) >= 2**31,
        CAUSAL=causal, HAS_PREFIX=causal and prefix is not None, PRECISION="ieee" if exact else "tf32",
    )  # fmt: skip


def _launch(config: Config) -> dict:
    return dict(
        BM=config.block_m, BN=config.block_n, STAGES=config.stages,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
