"""What the codegen audit compiles of `shared_attention`: every table of tiles in every kind of mask it serves."""

from __future__ import annotations

import itertools
import math

from ..runtime.audit_case import AuditCase
from . import shared_attention
from .shared_attention import config_for, padded_head_dim

KERNELS = {
    "fwd": shared_attention.attention_fwd_kernel,
    "dq": shared_attention.attention_dq_kernel,
    "dkdv": shared_attention.attention_dkdv_kernel,
    "short": shared_attention.attention_short_bwd_kernel,
    "dbias": shared_attention.attention_dbias_kernel,
}
ARCHS = (80, 90, 100, 120)
HEADS, GROUP = 12, 3
PLAIN, BIAS, CAUSAL, GROUPED, EVERYTHING = "", " bias", " causal", " causal grouped", " bias causal prefix"
MASKS = (PLAIN, BIAS, CAUSAL, GROUPED, EVERYTHING)


def audit_cases() -> list[AuditCase]:
    """Every kernel at the head dimensions in use, on every architecture.

    Every mask at 64 and 128; elsewhere without a mask, with a bias and with all at once, which are the cheapest, the
    commonest and the dearest. Short samples (64 tokens) have tiles of their own.
    """
    cases: list[AuditCase | None] = []
    for kernel, arch in itertools.product(KERNELS, ARCHS):
        for head_dim in (34, 40, 64, 88, 128, 256):
            masks = MASKS if head_dim in (64, 128) else (PLAIN, EVERYTHING) if head_dim == 40 else (
                PLAIN, BIAS, EVERYTHING)  # fmt: skip
            cases += [_case(kernel, "bf16", head_dim, 0, mask, arch) for mask in masks]
        for head_dim in (64, 128, 256):
            cases += [_case(kernel, "fp32", head_dim, 0, mask, arch) for mask in (BIAS, EVERYTHING)]
        cases.append(_case(kernel, "fp16", 64, 0, EVERYTHING, arch))
        if kernel in ("fwd", "short"):
            cases += [
                _case(kernel, "bf16", head_dim, 64, mask, arch)
                for head_dim in (64, 128)
                for mask in (PLAIN, EVERYTHING)
            ]
    unique = {(case.name, case.archs): case for case in cases if case is not None}
    return [case._replace(**_allowance(case)) for case in unique.values()]


# Bytes of spill stores plus loads, with the reason, by case and architecture.
FP32 = "IEEE fp32 without tensor cores: the next smaller tiles spill more, the next larger pass shared memory"
LOW = "tiles below the 64 rows of a warp group's product: larger ones spill"
SPILLS = {
    ("attention short bf16 Dh=64 causal 256x32", 90): (64, "at 255 registers; with a bias or a prefix nothing spills"),
    ("attention fwd fp32 Dh=256 bias 32x16", 100): (8, FP32),
    ("attention dq fp32 Dh=64 bias 32x32", 100): (16, FP32),
    ("attention dkdv fp32 Dh=128 bias 16x16", 100): (16, FP32),
    ("attention dq fp32 Dh=256 bias 16x16", 120): (520, FP32),
    ("attention dq fp32 Dh=256 bias causal prefix 16x16", 120): (556, FP32),
}


def _allowance(case: AuditCase) -> dict:
    spill, reason = SPILLS.get((case.name, *case.archs), (0, ""))
    return dict(allowed_spill=spill, reason=reason or case.reason)


def _case(kernel: str, dtype: str, head_dim: int, max_seqlen: int, mask: str, arch: int) -> AuditCase | None:
    """`max_seqlen` 0: the longest that the kernel takes. None where it is not shipped, or has no such mask."""
    itemsize, function = 4 if dtype == "fp32" else 2, KERNELS[kernel]
    bias, causal, grouped = "bias" in mask, "causal" in mask, "grouped" in mask
    if (kernel == "dbias" and not bias) or (kernel == "short" and grouped):
        return None
    found = [
        config_for(kernel, itemsize, head_dim, length, bias=bias, arch=arch)
        for length in ([max_seqlen] if max_seqlen else [256, 128, 64] if kernel == "short" else [1024])
    ]
    config = next((c for c in found if c is not None), None)
    if config is None:
        return None
    # S^T and dk, dv have the key tile as rows; the rest has the query tile.
    low = itemsize == 2 and arch in (90, 100) and (config.block_n if kernel == "dkdv" else config.block_m) < 64
    constants = dict(
        H=HEADS, GROUP=GROUP if grouped else 1, DH=head_dim, DHP=padded_head_dim(head_dim),
        ALIGN=math.gcd(16, head_dim), HAS_BIAS=bias, NATURAL=bias or itemsize == 4, WIDE_BIAS=False, CAUSAL=causal,
        HAS_PREFIX="prefix" in mask, PRECISION="ieee", BM=config.block_m, BN=config.block_n, STAGES=config.stages,
    )  # fmt: skip
    constants |= ({} if bias else dict(BIAS=None)) | ({} if "prefix" in mask else dict(PREFIX=None))
    types = dict.fromkeys(("CU", "ROWS", "POSITIONS", "PREFIX", "INVERSE"), "*i32")
    types |= dict.fromkeys(("Q", "K", "V", "O", "DO", "DQ", "DK", "DV", "BIAS", "DBIAS"), f"*{dtype}")
    types |= dict(LSE="*fp32", DELTA="*fp32", scale="fp32", score_scale="fp32")
    constants = {name: constants[name] for name in function.arg_names if name in constants}
    signature = {name: types.get(name, "i32") for name in function.arg_names if name not in constants}
    return AuditCase(
        kernel=function,
        name=f"attention {kernel} {dtype} Dh={head_dim}{mask} {config.block_m}x{config.block_n}",
        signature=signature,
        constants=constants,
        num_warps=config.warps,
        num_stages=config.stages,
        archs=(arch,),
        wgmma=not low,
        reason=LOW if low else "",
    )
