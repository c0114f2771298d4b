"""Suite `attention`: attention with a position bias over batches with padding, forward and training."""

from __future__ import annotations

import torch

from vlmo_kernels.ops import shared_attention

from .baselines import attend_published, attend_sdpa
from .cases import Batch, Case, make_batch
from .harness import Contestant, results_of

EAGER = "eager"
PASSES = ("forward", "training")


def _padded(name: str, attend, qkv: torch.Tensor, batch: Batch) -> Contestant:
    heads, head_dim = batch.case.heads, batch.case.dim // batch.case.heads
    leaf = batch.padded(qkv).requires_grad_()
    bias = batch.bias.clone().requires_grad_()

    def forward() -> torch.Tensor:
        q, k, v = leaf.permute(2, 0, 3, 1, 4).unbind(0)
        return attend(q, k, v, batch.mask, bias, head_dim**-0.5).transpose(1, 2)

    dy = batch.padded(batch.dy).unflatten(-1, (heads, head_dim))
    return Contestant(name, forward, batch.packed, dy, {"qkv": leaf, "bias": bias}, {"qkv": batch.packed})


def build(case: Case, device: str, dtype: torch.dtype, pass_: str) -> tuple[list[Contestant], dict]:
    """The contestants and the fp64 results."""
    batch = make_batch(case, device, dtype)
    heads, head_dim = case.heads, case.dim // case.heads
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(batch.layout.tokens, 3, heads, head_dim, generator=generator).to(device, dtype)
    leaf, bias = qkv.clone().requires_grad_(), batch.bias.clone().requires_grad_()
    ours = Contestant(
        "ours",
        lambda: shared_attention(leaf, None, None, batch.layout, bias=bias),
        grad_out=batch.dy.unflatten(-1, (heads, head_dim)),
        leaves={"qkv": leaf, "bias": bias},
    )
    compiled = torch.compile(attend_sdpa)
    contestants = [
        _padded(EAGER, attend_published, qkv, batch),
        _padded("sdpa", attend_sdpa, qkv, batch),
        _padded("compile", compiled, qkv, batch),
        ours,
    ]
    batch64 = Batch(case, batch.layout, batch.mask, batch.rows, batch.x, batch.dy.double(), batch.bias.double())
    return contestants, results_of(_padded("fp64", attend_published, qkv.double(), batch64), pass_)
