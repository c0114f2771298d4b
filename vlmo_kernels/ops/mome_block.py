"""`mome_block`: one pre-norm transformer block with modality experts, on packed rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmo_kernels.layout import Experts, ModalityLayout

from . import common
from .routed_ffn import routed_ffn
from .routed_linear import routed_linear
from .routed_norm import routed_norm
from .shared_attention import RelativePositionBias, shared_attention

Tensors = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class MoMEBlockParams:
    """Weights of one block. Every list has one entry per expert; a list of one entry is shared by all.

    Attributes:
        heads: number of attention heads `H`.
        norm1, norm2: weights and biases `[D]` of the norms before attention and feed-forward network.
        qkv: weights `[3D, D]` and biases `[3D]` of the query, key and value projection.
        proj: weights `[D, D]` and biases `[D]` of the output projection.
        w1, b1, w2, b2: the feed-forward networks, see `routed_ffn`.
        gamma1, gamma2: LayerScale `[D]` of the two branches.
        experts: modality or group to expert, for every list with several entries.
        activation: of the feed-forward networks.
        norm_kind: see `routed_norm`.
        eps: of the norms.
    """

    heads: int
    norm1: tuple[Tensors, Tensors]
    qkv: tuple[Tensors, Tensors]
    proj: tuple[Tensors, Tensors]
    norm2: tuple[Tensors, Tensors]
    w1: Tensors
    b1: Tensors
    w2: Tensors
    b2: Tensors
    gamma1: Tensors = (None,)
    gamma2: Tensors = (None,)
    experts: Experts | None = None
    activation: str = "gelu"
    norm_kind: str = "layer"
    eps: float = 1e-6

    def map_for(self, entries: Tensors) -> Experts | None:
        """The expert map of a list: None where one entry serves everybody."""
        return self.experts if len(entries) > 1 else None


def mome_block(
    x: torch.Tensor,
    params: MoMEBlockParams,
    layout: ModalityLayout,
    *,
    bias: torch.Tensor | RelativePositionBias | None = None,
    causal: bool = False,
    prefix: torch.Tensor | None = None,
    row_scale1: torch.Tensor | None = None,
    row_scale2: torch.Tensor | None = None,
    recompute: str = "activation",
    impl: str = "auto",
) -> torch.Tensor:
    """`x += gamma1 * attention(norm1(x))`, then `x += gamma2 * ffn[e](norm2[e](x))` (VLMo, section 3.1).

    Args:
        x: `[T, D]` packed rows, the residual stream; any floating dtype under autocast.
        params: the weights.
        layout: the plan of the batch.
        bias, causal, prefix: see `shared_attention`.
        row_scale1, row_scale2: fp32 `[T]`, DropPath's factors of the two branches.
        recompute: see `routed_ffn`.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        `[T, D]` in the dtype of `x`.

    Raises:
        As its ops; of `params`: TypeError for what is no MoMEBlockParams or no list, ValueError for heads and shapes
        that do not fit.
    """
    p = params
    _check(x, p, layout)
    width = x.shape[1]

    def norm(entries: tuple[Tensors, Tensors], x: torch.Tensor) -> torch.Tensor:
        experts = p.map_for(entries[0])
        return routed_norm(x, *entries, layout, experts, kind=p.norm_kind, eps=p.eps, impl=impl)

    qkv = routed_linear(norm(p.norm1, x), *p.qkv, layout, p.map_for(p.qkv[0]), impl=impl)
    qkv = qkv.view(-1, 3, p.heads, width // p.heads)
    o = shared_attention(qkv, None, None, layout, bias=bias, causal=causal, prefix=prefix, impl=impl)
    x = routed_linear(
        o.view(-1, width), *p.proj, layout, p.map_for(p.proj[0]),
        gamma=_for_all(p.gamma1, p.proj[0]), residual=x, row_scale=row_scale1, impl=impl,
    )  # fmt: skip
    return routed_ffn(
        norm(p.norm2, x), p.w1, p.b1, p.w2, p.b2, layout, p.map_for(p.w1), activation=p.activation,
        gamma=_for_all(p.gamma2, p.w1), residual=x, row_scale=row_scale2, recompute=recompute, impl=impl,
    )  # fmt: skip


def _check(x: torch.Tensor, p: MoMEBlockParams, layout: ModalityLayout) -> None:
    """What the ops of a block would say in words that its caller does not know."""
    op = "mome_block"
    common.check_rows(op, "x", x, layout)
    if not isinstance(p, MoMEBlockParams):
        raise TypeError(f"{op}: `params` must be MoMEBlockParams, got {type(p).__name__}")
    width = x.shape[1]
    if not isinstance(p.heads, int) or p.heads <= 0 or width % p.heads:
        raise ValueError(f"{op}: `heads` must divide the width {width} of `x`, got {p.heads!r}")
    lists = {"w1": p.w1, "gamma1": p.gamma1, "gamma2": p.gamma2}
    for name in ("norm1", "qkv", "proj", "norm2"):
        pair = getattr(p, name)
        if not isinstance(pair, Sequence) or len(pair) != 2:
            given = type(pair).__name__ + (f" of {len(pair)}" if isinstance(pair, Sequence) else "")
            raise TypeError(f"{op}: `params.{name}` must be a pair, weights and biases, got {given}")
        lists[f"{name}[0]"] = pair[0]
    for name, entries in lists.items():
        if not isinstance(entries, Sequence) or not entries:
            given = "an empty one" if isinstance(entries, Sequence) else type(entries).__name__
            raise TypeError(f"{op}: `params.{name}` must be a list, one entry per expert or one for all, got {given}")
    for name, out in (("qkv", 3 * width), ("proj", width)):
        for e, weight in enumerate(getattr(p, name)[0]):
            common.check_shape(op, f"params.{name}[0][{e}]", weight, (out, width), x)


def _for_all(gammas: Tensors, like: Tensors) -> list[torch.Tensor | None]:
    """One entry for every expert of `like`; a single one serves all."""
    return list(gammas) * len(like) if len(gammas) == 1 else list(gammas)


def calls(given: Mapping[str, Any]) -> list[tuple[str, tuple, dict]]:
    """The ops of a block with arguments of the right kind, for `explain`; results stand in as empty buffers.

    Args:
        given: arguments of `mome_block` by name, all of them.
    """
    x, p, layout, impl = given["x"], given["params"], given["layout"], given["impl"]
    _check(x, p, layout)
    qkv = x.new_empty(x.shape[0], 3, p.heads, x.shape[1] // p.heads)
    norm = {"kind": p.norm_kind, "eps": p.eps, "impl": impl}
    return [
        ("routed_norm", (x, *p.norm1, layout, p.map_for(p.norm1[0])), norm),
        ("routed_linear", (x, *p.qkv, layout, p.map_for(p.qkv[0])), {"impl": impl}),
        ("shared_attention", (qkv, None, None, layout),
         {name: given[name] for name in ("bias", "causal", "prefix", "impl")}),
        ("routed_linear", (x, *p.proj, layout, p.map_for(p.proj[0])),
         {"gamma": _for_all(p.gamma1, p.proj[0]), "residual": x, "row_scale": given["row_scale1"], "impl": impl}),
        ("routed_norm", (x, *p.norm2, layout, p.map_for(p.norm2[0])), norm),
        ("routed_ffn", (x, p.w1, p.b1, p.w2, p.b2, layout, p.map_for(p.w1)),
         {"activation": p.activation, "gamma": _for_all(p.gamma2, p.w1), "residual": x,
          "row_scale": given["row_scale2"], "recompute": given["recompute"], "impl": impl}),
    ]  # fmt: skip
