"""A small call of every op: what `info` explains and what `check` tries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlmo_kernels.layout import ModalityLayout
from vlmo_kernels.ops import MoMEBlockParams, mome_block, routed_ffn, routed_linear, routed_norm, shared_attention
from vlmo_kernels.runtime.dispatch import Explanation, explain

Runs = list[list[tuple[str, int]]]


@dataclass
class Call:
    """One op on one batch: `function(tensors, layout, impl)`; `tensors` by name, all differentiable."""

    op: str
    tensors: dict[str, torch.Tensor]
    layout: ModalityLayout
    function: Callable[[dict[str, torch.Tensor], ModalityLayout, str], torch.Tensor]

    def __call__(self, impl: str) -> torch.Tensor:
        return self.function(self.tensors, self.layout, impl)

    def to(self, dtype: torch.dtype) -> Call:
        """The same call on copies in another dtype that need gradients; strides are kept."""
        tensors = {name: t.detach().to(dtype).requires_grad_() for name, t in self.tensors.items()}
        return Call(self.op, tensors, self.layout, self.function)


def make_layout(runs: Runs, device: str) -> ModalityLayout:
    """Text and image, whatever the runs hold."""
    return ModalityLayout.from_runs(runs, modalities=("text", "image"), device=device)


def make_call(
    op: str, layout: ModalityLayout, width: int, dtype: torch.dtype, strided: bool = False, seed: int = 0
) -> Call:
    """Random operands of order 1; with `strided`, activations are views with a row stride and an offset."""
    generator = torch.Generator().manual_seed(seed)
    rows, device = layout.tokens, layout.device

    def draw(*shape: int, scale: float = 1.0, wide: bool = False) -> torch.Tensor:
        if wide and strided:
            shape = (*shape[:-1], shape[-1] + 3)
        t = (torch.randn(*shape, generator=generator) * scale).to(device, dtype)
        return t[..., 2:-1] if wide and strided else t

    heads, hidden = 2, 2 * width
    shapes = _shapes(op, width, hidden)
    tensors = {name: draw(*shape, scale=scale) for name, (shape, scale) in shapes.items()}
    if op == "shared_attention":
        head_dim = width // heads
        tensors |= {name: draw(rows, heads, head_dim, wide=True) for name in ("q", "k", "v")}
    else:
        tensors["x"] = draw(rows, width, wide=True)
    if op in ("routed_linear", "routed_ffn", "routed_norm"):
        tensors["residual"] = draw(rows, width, wide=True)
    if op in ("shared_attention", "mome_block"):
        tensors["bias"] = draw(heads, max(layout.max_seqlen, 1), max(layout.max_seqlen, 1))
    return Call(op, tensors, layout, _FUNCTIONS[op])


def _shapes(op: str, width: int, hidden: int) -> dict[str, tuple[tuple[int, ...], float]]:
    """Weights by name: shape and scale."""
    found = {}
    for e in (0, 1):
        if op == "routed_linear":
            found |= {f"w{e}": ((width, width), width**-0.5), f"b{e}": ((width,), 1.0), f"gamma{e}": ((width,), 1.0)}
        if op in ("routed_norm", "mome_block"):
            found |= {f"n{e}": ((width,), 1.0), f"m{e}": ((width,), 1.0)}
        if op in ("routed_ffn", "mome_block"):
            found |= {
                f"w1{e}": ((hidden, width), width**-0.5), f"b1{e}": ((hidden,), 1.0),
                f"w2{e}": ((width, hidden), hidden**-0.5), f"b2{e}": ((width,), 1.0), f"gamma{e}": ((width,), 1.0),
            }  # fmt: skip
    if op == "mome_block":
        found |= {
            "n": ((width,), 1.0), "m": ((width,), 1.0), "qkv": ((3 * width, width), width**-0.5),
            "qkv_b": ((3 * width,), 1.0), "proj": ((width, width), width**-0.5), "proj_b": ((width,), 1.0),
            "gamma": ((width,), 1.0),
        }  # fmt: skip
    return found


def _linear(t, layout, impl):
    return routed_linear(
        t["x"], [t["w0"], t["w1"]], [t["b0"], t["b1"]], layout, gamma=[t["gamma0"], t["gamma1"]],
        residual=t["residual"], impl=impl,
    )  # fmt: skip


def _norm(t, layout, impl):
    out = routed_norm(t["x"], [t["n0"], t["n1"]], [t["m0"], t["m1"]], layout, residual=t["residual"], impl=impl)
    return torch.cat(out, dim=1)


def _pair(t, name):
    return [t[f"{name}0"], t[f"{name}1"]]


def _ffn(t, layout, impl):
    return routed_ffn(
        t["x"], _pair(t, "w1"), _pair(t, "b1"), _pair(t, "w2"), _pair(t, "b2"), layout, gamma=_pair(t, "gamma"),
        residual=t["residual"], impl=impl,
    )  # fmt: skip


def _attention(t, layout, impl):
    return shared_attention(t["q"], t["k"], t["v"], layout, bias=t["bias"], impl=impl)


def _block(t, layout, impl):
    params = MoMEBlockParams(
        heads=2, norm1=([t["n"]], [t["m"]]), qkv=([t["qkv"]], [t["qkv_b"]]), proj=([t["proj"]], [t["proj_b"]]),
        norm2=(_pair(t, "n"), _pair(t, "m")), w1=_pair(t, "w1"), b1=_pair(t, "b1"), w2=_pair(t, "w2"),
        b2=_pair(t, "b2"), gamma1=[t["gamma"]], gamma2=_pair(t, "gamma"),
    )  # fmt: skip
    return mome_block(t["x"], params, layout, bias=t["bias"], impl=impl)


_FUNCTIONS = {
    "routed_linear": _linear,
    "routed_norm": _norm,
    "routed_ffn": _ffn,
    "shared_attention": _attention,
    "mome_block": _block,
}
OPS = tuple(_FUNCTIONS)
# A block is made of the other ops: it has no implementation of its own to be asked about.
_EXPLAINED = {
    "routed_linear": lambda t, layout: ((t["x"], [t["w0"], t["w1"]], None, layout), {}),
    "routed_norm": lambda t, layout: ((t["x"], [t["n0"], t["n1"]], None, layout), {}),
    "routed_ffn": lambda t, layout: (
        (t["x"], _pair(t, "w1"), _pair(t, "b1"), _pair(t, "w2"), _pair(t, "b2"), layout), {}
    ),
    "shared_attention": lambda t, layout: ((t["q"], t["k"], t["v"], layout), {}),
}  # fmt: skip
EXPLAINED_OPS = tuple(_EXPLAINED)


def explain_op(op: str, device: str, dtype: torch.dtype, impl: str = "auto") -> Explanation:
    """What `vlmo_kernels.explain` says about a small call."""
    call = make_call(op, make_layout([[("text", 3), ("image", 4)]], device), 32, dtype)
    arguments, options = _EXPLAINED[op](call.tensors, call.layout)
    return explain(op, *arguments, impl=impl, **options)
