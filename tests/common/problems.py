"""Every op and variant as a pair of functions of the same padded leaves: the package's and eager's.

Both sides get `[B, N, ...]` tensors and return `[B, N, ...]` tensors, so results and gradients compare
one to one. Gammas are of order 1, and most variants have no residual: neither may hide the op's own error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

import vlmo_kernels as vk
from vlmo_kernels.runtime.dispatch import Request, load

from . import eager
from .cases import EXPERT_COUNT, EXPERTS, Case

Leaves = dict[str, torch.Tensor]
Outputs = tuple[torch.Tensor, ...]
D, HIDDEN, OUT = 40, 72, 24  # none a multiple of 16
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 10
TABLE = 11
EPS = 1e-5
PER_TOKEN = ("x", "residual", "q", "k", "v", "qkv")


def none(case: Case) -> Leaves:
    return {}


@dataclass(frozen=True, eq=False)
class Problem:
    """One op in one variant.

    Attributes:
        op: its public name.
        name: of the variant.
        shapes: leaf to its shape; without the leading `[B, N]` for per-token leaves.
        ours: `(leaves, case, layout, impl)` to outputs.
        eager: `(leaves, case)` to outputs.
        constants: further leaves, without gradient, from the case.
        feature: what the choice of an implementation depends on: the kind of norm, the activation.
    """

    op: str
    name: str
    shapes: Mapping[str, tuple[int, ...]]
    ours: Callable[[Leaves, Case, vk.ModalityLayout, str], Outputs]
    eager: Callable[[Leaves, Case], Outputs]
    feature: str = ""
    constants: Callable[[Case], Leaves] = none

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def leaves(self, case: Case, dtype: torch.dtype, seed: int = 0) -> Leaves:
        """Random leaves that require gradients, equal in every dtype up to rounding, and the constants."""
        generator = torch.Generator().manual_seed(seed)
        tokens = tuple(case.ids().shape)
        result = {}
        for name, shape in self.shapes.items():
            full = (*tokens, *shape) if name in PER_TOKEN else shape
            value = torch.randn(full, generator=generator, dtype=torch.float64)
            if len(shape) == 2 and name not in PER_TOKEN and name != "table":
                value *= shape[1] ** -0.5  # weights: outputs of order 1
            result[name] = value.to(dtype).requires_grad_()
        return result | self.constants(case)

    def run(self, function: Callable[..., Outputs], leaves: Leaves, *rest) -> tuple[Outputs, Leaves]:
        """Outputs, and the gradient (None: no path) of every trained leaf for fixed random cotangents."""
        trained = {name: t for name, t in leaves.items() if t.requires_grad}
        outputs = function(leaves, *rest)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
        paths = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        if not paths:  # eager on a batch without tokens
            return outputs, dict.fromkeys(trained)
        grads = torch.autograd.grad(
            [o for o, _ in paths], list(trained.values()), [c for _, c in paths], allow_unused=True
        )
        return tuple(o.detach() for o in outputs), dict(zip(trained, grads, strict=True))


def in_fp64(leaves: Leaves) -> Leaves:
    return {n: t.detach().double().requires_grad_() if t.requires_grad else t for n, t in leaves.items()}


def supported(problem: Problem, dtype: torch.dtype, impl: str) -> bool:
    """Whether an implementation takes the op, in this variant and dtype, on the CPU."""
    if impl == "reference":
        return True
    parts = {problem.op: problem.feature}
    if problem.op == "mome_block":
        parts = {"routed_norm": "layer", "routed_linear": "", "shared_attention": "", "routed_ffn": "gelu"}
    requests = [Request(op, torch.device("cpu"), dtype, frozenset({f})) for op, f in parts.items()]
    return all(load(r.op, impl).why_not(r) is None for r in requests)


def many(leaves: Leaves, name: str) -> list[torch.Tensor | None]:
    """The leaf of every expert, None where it has none."""
    return [leaves.get(f"{name}.{e}") for e in range(EXPERT_COUNT)]


def per_expert(name: str, *shape: int, without: int | None = None) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{e}": shape for e in range(EXPERT_COUNT) if e != without}


def row_scale(case: Case) -> Leaves:
    """fp32 `[B, N]`: DropPath that drops every third token and scales the others differently."""
    count = case.ids().numel()
    factors = torch.tensor([0.0, 1.25, 0.5]).repeat(count // 3 + 1)[:count]
    return {"row_scale": factors.reshape(case.ids().shape)}


def packed(t: torch.Tensor | None, layout: vk.ModalityLayout) -> torch.Tensor | None:
    return None if t is None else layout.pack_padded(t)


def _linear(name: str, epilogue: bool) -> Problem:
    def ours(t: Leaves, case: Case, layout: vk.ModalityLayout, impl: str) -> Outputs:
        y = vk.routed_linear(
            packed(t["x"], layout), many(t, "w"), many(t, "b"), layout, EXPERTS, gamma=many(t, "gamma"),
            residual=packed(t.get("residual"), layout), impl=impl,
            row_scale=packed(t.get("row_scale"), layout),
        )  # fmt: skip
        return (layout.unpack(y),)

    def unfused(t: Leaves, case: Case) -> Outputs:
        return (
            eager.routed_linear(
                t["x"], case.expert_ids(), many(t, "w"), many(t, "b"), many(t, "gamma"), t.get("residual"),
                t.get("row_scale"),
            ),
        )  # fmt: skip

    shapes = {"x": (D,), **per_expert("w", OUT, D), **per_expert("b", OUT, without=1)}
    if epilogue:
        shapes |= {"residual": (OUT,), **per_expert("gamma", OUT, without=2)}
    return Problem("routed_linear", name, shapes, ours, unfused, constants=row_scale if epilogue else none)


def _norm(kind: str, residual: bool) -> Problem:
    def ours(t: Leaves, case: Case, layout: vk.ModalityLayout, impl: str) -> Outputs:
        result = vk.routed_norm(
            packed(t["x"], layout), many(t, "w"), many(t, "b"), layout, EXPERTS, kind=kind, eps=EPS,
            residual=packed(t.get("residual"), layout), impl=impl,
        )  # fmt: skip
        return tuple(layout.unpack(y) for y in (result if residual else (result,)))

    def unfused(t: Leaves, case: Case) -> Outputs:
        return eager.routed_norm(
            t["x"], case.expert_ids(), many(t, "w"), many(t, "b"), kind, EPS, t.get("residual")
        )

    shapes = {"x": (D,), **per_expert("w", D, without=2), **per_expert("b", D, without=1)}
    if residual:
        shapes["residual"] = (D,)
    return Problem("routed_norm", kind + "_residual" * residual, shapes, ours, unfused, kind)


def _ffn(activation: str, name: str = "", full: bool = False, stacked: bool = False, recompute: bool = False):
    gated = activation in ("swiglu", "geglu", "geglu_tanh")

    def ours(t: Leaves, case: Case, layout: vk.ModalityLayout, impl: str) -> Outputs:
        w1, b1, w_up, b_up = many(t, "w1"), many(t, "b1"), None, None
        if gated and stacked:
            w1 = [torch.cat(pair) for pair in zip(w1, many(t, "w_up"), strict=True)]
            b1 = [None if b is None else torch.cat([b, torch.zeros_like(b)]) for b in b1]
        elif gated:
            w_up = many(t, "w_up")
        y = vk.routed_ffn(
            packed(t["x"], layout), w1, b1, many(t, "w2"), many(t, "b2"), layout, EXPERTS, eps=EPS, impl=impl,
            activation=activation, w_up=w_up, b_up=b_up, gamma=many(t, "gamma"),
            inner_norm=(many(t, "norm_w"), many(t, "norm_b")) if full else None,
            residual=packed(t.get("residual"), layout),
            row_scale=packed(t.get("row_scale"), layout),
            recompute="full" if recompute else "activation",
        )  # fmt: skip
        return (layout.unpack(y),)

    def unfused(t: Leaves, case: Case) -> Outputs:
        return (
            eager.routed_ffn(
                t["x"], case.expert_ids(), many(t, "w1"), many(t, "b1"), many(t, "w2"), many(t, "b2"), activation,
                w_up=many(t, "w_up") if gated else None, gammas=many(t, "gamma"),
                norm_weights=many(t, "norm_w") if full else None, norm_biases=many(t, "norm_b"),
                residual=t.get("residual"), row_scale=t.get("row_scale"), eps=EPS,
            ),
        )  # fmt: skip

    shapes = {"x": (D,), **per_expert("w1", HIDDEN, D), **per_expert("b1", HIDDEN)}
    shapes |= {**per_expert("w2", D, HIDDEN), **per_expert("b2", D, without=1), **per_expert("gamma", D)}
    if gated:
        shapes |= per_expert("w_up", HIDDEN, D)
    if full:
        shapes |= {"residual": (D,), **per_expert("norm_w", HIDDEN), **per_expert("norm_b", HIDDEN)}
    return Problem("routed_ffn", name or activation, shapes, ours, unfused, activation, row_scale if full else none)


def _attention(
    name: str, kv_heads: int = HEADS, dim: int = HEAD_DIM, bias: bool = False, causal: bool = False,
    prefix: bool = False, fused: bool = False,
) -> Problem:  # fmt: skip
    def constants(case: Case) -> Leaves:
        at = torch.arange(case.ids().shape[1])
        index = (at[:, None] - at[None, :]).clamp(-(TABLE // 2), TABLE // 2) + TABLE // 2
        prefixes = torch.arange(len(case.runs), dtype=torch.int32) * 3
        return ({"index": index} if bias else {}) | ({"prefix": prefixes} if prefix else {})

    def ours(t: Leaves, case: Case, layout: vk.ModalityLayout, impl: str) -> Outputs:
        q, k, v = (packed(t.get(n), layout) for n in (("qkv", "none", "none") if fused else "qkv"))
        o = vk.shared_attention(
            q, k, v, layout, causal=causal, prefix=t.get("prefix"), impl=impl,
            bias=vk.RelativePositionBias(t["table"], t["index"]) if bias else None,
        )  # fmt: skip
        return (layout.unpack(o),)

    def unfused(t: Leaves, case: Case) -> Outputs:
        q, k, v = t["qkv"].unbind(2) if fused else (t[n] for n in "qkv")
        dense = t["table"][t["index"]].permute(2, 0, 1) if bias else None
        return (eager.shared_attention(q, k, v, case.ids() >= 0, dense, causal, t.get("prefix")),)

    shapes = {"q": (HEADS, dim), "k": (kv_heads, dim), "v": (kv_heads, dim)}
    if fused:
        shapes = {"qkv": (3, HEADS, dim)}
    if bias:
        shapes["table"] = (TABLE, HEADS)
    return Problem("shared_attention", name, shapes, ours, unfused, constants=constants)


def _block() -> Problem:
    """Norm, attention with shared projections, and routed FFN; LayerScale of order 1."""
    norms = {f"norm{i}_{p}": (D,) for i in (1, 2) for p in "wb"}
    shapes = {"x": (D,), "qkv_w": (3 * D, D), "qkv_b": (3 * D,), "proj_w": (D, D), "proj_b": (D,), **norms}
    shapes |= {**per_expert("w1", HIDDEN, D), **per_expert("b1", HIDDEN), **per_expert("w2", D, HIDDEN)}
    shapes |= {**per_expert("b2", D), "gamma1": (D,), **per_expert("gamma2", D)}

    def ours(t: Leaves, case: Case, layout: vk.ModalityLayout, impl: str) -> Outputs:
        params = vk.MoMEBlockParams(
            heads=HEADS, norm1=([t["norm1_w"]], [t["norm1_b"]]), qkv=([t["qkv_w"]], [t["qkv_b"]]),
            proj=([t["proj_w"]], [t["proj_b"]]), norm2=([t["norm2_w"]], [t["norm2_b"]]), w1=many(t, "w1"),
            b1=many(t, "b1"), w2=many(t, "w2"), b2=many(t, "b2"), gamma1=[t["gamma1"]], gamma2=many(t, "gamma2"),
            experts=EXPERTS, eps=EPS,
        )  # fmt: skip
        return (layout.unpack(vk.mome_block(packed(t["x"], layout), params, layout, impl=impl)),)

    def unfused(t: Leaves, case: Case) -> Outputs:
        experts = case.expert_ids()
        valid = (experts >= 0)[..., None]
        h = eager.norm(t["x"], t["norm1_w"], t["norm1_b"], "layer", EPS)
        qkv = torch.nn.functional.linear(h, t["qkv_w"], t["qkv_b"]).unflatten(-1, (3, HEADS, -1))
        o = eager.shared_attention(*qkv.unbind(2), experts >= 0).flatten(2)
        x = t["x"] + t["gamma1"] * torch.nn.functional.linear(o, t["proj_w"], t["proj_b"])
        x = torch.where(valid, x, 0.0)
        h = eager.norm(x, t["norm2_w"], t["norm2_b"], "layer", EPS)
        return (
            eager.routed_ffn(
                h, experts, many(t, "w1"), many(t, "b1"), many(t, "w2"), many(t, "b2"), "gelu",
                gammas=many(t, "gamma2"), residual=x,
            ),
        )  # fmt: skip

    return Problem("mome_block", "vlmo", shapes, ours, unfused)


PROBLEMS = {
    str(problem): problem
    for problem in (
        _linear("plain", epilogue=False),
        _linear("epilogue", epilogue=True),
        *(_norm(kind, residual) for kind in ("layer", "rms", "rms1p") for residual in (False, True)),
        *(_ffn(a) for a in ("gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu", "geglu_tanh")),
        _ffn("gelu", "full", full=True),
        _ffn("geglu", "gated_full", full=True),
        _ffn("swiglu", "stacked", stacked=True),
        _ffn("gelu", "recompute", recompute=True),
        _attention("plain"),
        _attention("packed", fused=True),
        _attention("gqa", kv_heads=KV_HEADS),
        _attention("head_dim_34", dim=34),
        _attention("bias", bias=True),
        _attention("packed_bias", bias=True, fused=True),
        _attention("causal", causal=True),
        _attention("prefix_bias", bias=True, causal=True, prefix=True),
        _block(),
    )
}
