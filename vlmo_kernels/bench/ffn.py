"""Suite `ffn`: the routed feed-forward network with LayerScale and residual, forward and training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vlmo_kernels.ops import routed_ffn
from vlmo_kernels.runtime.frozen import frozen_weights

from .baselines import ffn_cublaslt, ffn_grouped, ffn_masked, ffn_split
from .cases import Batch, Case, make_batch
from .harness import Contestant, results_of

EAGER = "split"
PASSES = ("forward", "training")
_NAMES = ("w1", "b1", "w2", "b2")


def _weights(case: Case, device: str, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """`<expert>.<name>` to parameter, and `gamma`."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"w1": (case.hidden, case.dim), "b1": (case.hidden,), "w2": (case.dim, case.hidden), "b2": (case.dim,)}
    out = {
        f"{e}.{name}": nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device, dtype))
        for e in range(2)
        for name, shape in shapes.items()
    }
    gamma = 1 + 0.1 * torch.randn(case.dim, generator=generator)
    return out | {"gamma": nn.Parameter(gamma.to(device, dtype))}


def _contestant(name: str, function, weights, batch: Batch, to=lambda t: t, back=lambda t: t) -> Contestant:
    """`function(x, residual, experts, gamma)`; `to` and `back` change the order of rows."""
    x = to(batch.x).clone().requires_grad_()
    experts = [[weights[f"{e}.{n}"] for n in _NAMES] for e in range(2)]
    return Contestant(
        name, lambda: function(x, x, experts, weights["gamma"]), back, to(batch.dy), {"x": x, **weights}, {"x": back}
    )


def build(case: Case, device: str, dtype: torch.dtype, pass_: str) -> tuple[list[Contestant], dict]:
    """The contestants and the fp64 results."""
    batch, weights = make_batch(case, device, dtype), _weights(case, device, dtype)
    layout = batch.layout
    sizes = [sum(case.text), sum(case.image)]
    expert = torch.arange(2, device=device).repeat_interleave(torch.tensor(sizes, device=device))
    order = batch.rows.argsort()  # the masked contestant keeps the tokens sample by sample
    masks = [expert[order] == e for e in range(2)]

    def ours(x, residual, experts, gamma):
        w1, b1, w2, b2 = zip(*experts, strict=True)
        return routed_ffn(x, w1, b1, w2, b2, layout, gamma=[gamma] * 2, residual=residual)

    def split(x, residual, experts, gamma):
        return ffn_split(x, residual, sizes, experts, gamma)

    def masked(x, residual, experts, gamma):
        return ffn_masked(x, residual, masks, experts, gamma)

    contestants = [
        _contestant(EAGER, split, weights, batch),
        _contestant("masks", masked, weights, batch, lambda t: t[order], lambda t: t[order.argsort()]),
        _contestant("compile", torch.compile(split), weights, batch),
    ]
    if pass_ == "forward" and device != "cpu":

        def cublaslt(x, residual, experts, gamma):
            return ffn_cublaslt(x, residual, sizes, experts, gamma)

        contestants.append(_contestant("cublaslt", cublaslt, weights, batch))
    if hasattr(F, "grouped_mm") and pass_ == "forward":
        stacks = [torch.stack([weights[f"{e}.{n}"].detach() for e in range(2)]) for n in _NAMES]
        stacks = [s.transpose(1, 2) if s.dim() == 3 else s for s in stacks]
        offsets = torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)

        def grouped(x, residual, experts, gamma):
            return ffn_grouped(x, residual, offsets, expert, *stacks, gamma)

        contestants.append(_contestant("grouped_mm", grouped, weights, batch))
    contestants.append(_contestant("ours", ours, weights, batch))
    if pass_ == "forward":
        frozen = _contestant("ours_frozen", ours, weights, batch)
        owner = nn.ParameterList(weights.values())
        frozen.scope = lambda: frozen_weights(owner)
        contestants.append(frozen)
    double = {k: nn.Parameter(p.detach().double()) for k, p in weights.items()}
    batch64 = Batch(case, layout, batch.mask, batch.rows, batch.x.double(), batch.dy.double(), batch.bias)
    return contestants, results_of(_contestant("fp64", split, double, batch64), pass_)
