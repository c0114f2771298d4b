"""Suite `block`: one VLMo block, forward and training."""

from __future__ import annotations

import copy

import torch

from vlmo_kernels.modules import MoMEBlock
from vlmo_kernels.runtime.frozen import frozen_weights

from .baselines import PaddedBlock, attend_published, attend_sdpa
from .cases import Batch, Case, make_batch
from .harness import Contestant, results_of

EAGER = "eager"
PASSES = ("forward", "training")


def _module(case: Case, device: str, dtype: torch.dtype) -> MoMEBlock:
    """Weights of which none is neutral; LayerScale of order 1, so that the block's own error is seen."""
    block = MoMEBlock(case.dim, case.heads, case.hidden, layer_scale=1.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in block.named_parameters():
            ones = "gamma" in name or "norm" in name and name.endswith("weight")
            p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if ones else 0.02) + (1.0 if ones else 0.0))
    return block.to(device, dtype)


def _padded(name: str, module, block: MoMEBlock, batch: Batch) -> Contestant:
    x = batch.padded(batch.x).requires_grad_()
    bias = batch.bias.clone().requires_grad_()
    return Contestant(
        name,
        lambda: module(x, batch.mask, bias),
        batch.packed,
        batch.padded(batch.dy),
        {"x": x, "bias": bias, **dict(block.named_parameters())},
        {"x": batch.packed},
    )


def _packed(name: str, module, block: MoMEBlock, batch: Batch) -> Contestant:
    x = batch.x.clone().requires_grad_()
    bias = batch.bias.clone().requires_grad_()
    leaves = {"x": x, "bias": bias, **dict(block.named_parameters())}
    return Contestant(name, lambda: module(x, batch.layout, bias), grad_out=batch.dy, leaves=leaves)


def build(case: Case, device: str, dtype: torch.dtype, pass_: str) -> tuple[list[Contestant], dict]:
    """The contestants and the fp64 results."""
    batch, block = make_batch(case, device, dtype), _module(case, device, dtype)
    sdpa = PaddedBlock(block, case.text_length, attend_sdpa)
    contestants = [
        _padded(EAGER, PaddedBlock(block, case.text_length, attend_published), block, batch),
        _padded("sdpa", sdpa, block, batch),
        _padded("compile", torch.compile(sdpa), block, batch),
        _packed("ours", block, block, batch),
    ]
    if pass_ == "forward":
        frozen = _packed("ours_frozen", block, block, batch)
        frozen.scope = lambda: frozen_weights(block)
        contestants.append(frozen)
    double = copy.deepcopy(block).double()
    batch64 = Batch(
        case, batch.layout, batch.mask, batch.rows, batch.x.double(), batch.dy.double(), batch.bias.double()
    )
    reference = _padded("fp64", PaddedBlock(double, case.text_length, attend_published), double, batch64)
    return contestants, results_of(reference, pass_)
