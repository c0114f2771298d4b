"""Suite `attention`: attention with a position bias over batches with padding, forward and training."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch.nn.attention.flex_attention import create_block_mask

from vlmo_kernels.ops import shared_attention

from .baselines import attend_flex, attend_published, attend_sdpa, attend_xformers
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


def _flex(qkv: torch.Tensor, batch: Batch, pass_: str) -> Contestant:
    """The packed peer. Its tokens are ordered sample by sample, so that most blocks of the mask are empty."""
    heads, head_dim = batch.case.heads, batch.case.dim // batch.case.heads
    order = batch.rows.argsort()
    back = order.argsort()
    sample, positions = batch.layout.sample_of_row[order], batch.layout.positions[order]
    count = batch.layout.tokens
    block_mask = create_block_mask(lambda b, h, i, j: sample[i] == sample[j], None, None, count, count, qkv.device)
    compiled = torch.compile(attend_flex)
    # On a CPU it has no backward, and refuses inputs that need gradients even where none are computed.
    training = pass_ == "training"
    leaf, bias = qkv[order].requires_grad_(training), batch.bias.clone().requires_grad_(training)
    return Contestant(
        "flex",
        lambda: compiled(leaf, bias, positions, block_mask),
        lambda t: t[back],
        batch.dy.unflatten(-1, (heads, head_dim))[order],
        {"qkv": leaf, "bias": bias},
        {"qkv": lambda t: t[back]},
        note="packed; its block mask is made beforehand and not timed, like our plan",
    )


def why_no_xformers(device: str) -> str:
    """Empty where xformers can be tried."""
    if device == "cpu":
        return "its kernels need a GPU"
    return "" if find_spec("xformers") else "xformers is not installed"


def _xformers(qkv: torch.Tensor, batch: Batch) -> Contestant:
    found = _padded("xformers", attend_xformers, qkv, batch)
    found.missing = why_no_xformers(qkv.device.type)
    found.note = "padded, for its packed form takes no bias"
    # It keeps bias and mask for backward as an attribute, not as a saved tensor.
    length = batch.case.length
    found.unseen_bytes = batch.case.batch * batch.case.heads * length * (length + -length % 8) * qkv.element_size()
    return found


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
        _flex(qkv, batch, pass_),
        _xformers(qkv, batch),
        ours,
    ]
    batch64 = Batch(case, batch.layout, batch.mask, batch.rows, batch.x, batch.dy.double(), batch.bias.double())
    return contestants, results_of(_padded("fp64", attend_published, qkv.double(), batch64), pass_)
