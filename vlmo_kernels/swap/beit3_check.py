"""Which BEiT-3 encoders the kernels can compute, and why not the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .instance import child_at, is_swapped, plain, untouched

_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_NORMS = ("self_attn_layer_norm", "final_layer_norm", "self_attn.inner_attn_ln")
_ACTIVATIONS = (("gelu", F.gelu), ("relu", F.relu), ("silu", F.silu))


def recognises(module: nn.Module) -> bool:
    """Whether a module has the parts of a multiway encoder, under their names."""
    layers = module._modules.get("layers")
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(module, "forward_embedding"):
        return False
    attn = getattr(layers[0], "self_attn", None)  # also through a wrapper, to name it in the report
    return all(isinstance(child_at(attn, f"{p.partition('.')[2]}.{e}"), nn.Module) for p in _LINEARS for e in "AB")


def why_not(encoder: nn.Module) -> str | None:
    """Why the kernels would not compute what this encoder computes, or None."""
    cls = type(encoder)._made_of[1] if is_swapped(encoder) else type(encoder)
    if "forward" in vars(encoder) or not _defines(cls, "forward", "Encoder"):
        return f"{cls.__name__} has another forward than torchscale's Encoder"
    if getattr(encoder, "relative_position", None) is not None:
        return "relative_position: the kernels have no bias by buckets"
    if encoder.layer_norm is not None:
        why = untouched(encoder.layer_norm, "layer_norm")
        why = why or _multiway(encoder, "layer_norm") or _norms(encoder, "layer_norm")
        if why:
            return why
    for i, layer in enumerate(encoder.layers):
        why = untouched(layer, f"layers.{i}")
        if why:
            return why
        why = _layer(layer)
        if why:
            return f"layers.{i}: {why}"
    return None


def activation(ffn: nn.Module) -> str | None:
    """The kernels' name of a feed-forward network's activation."""
    for name, function in _ACTIVATIONS:
        if ffn.activation_fn is function:
            return name
    return None


def _layer(layer: nn.Module) -> str | None:
    attn = layer.self_attn
    for owner, name in ((layer, "EncoderLayer"), (attn, "MultiheadAttention")):
        why = _own_forward(owner, name)
        if why:
            return why
    if getattr(layer, "is_moe_layer", False):
        return "a mixture-of-experts layer, which the kernels do not have"
    if not layer.normalize_before:
        return "post-norm (normalize_before is false), the kernels have pre-norm"
    if layer.alpha != 1.0 or not _defines(type(layer), "residual_connection", "EncoderLayer"):
        return "the residual is scaled (deepnorm), which the kernels do not do"
    if getattr(attn, "xpos", None) is not None:
        return "self_attn.xpos: the kernels have no rotary positions"
    if attn.num_heads * attn.head_dim != attn.embed_dim:
        return f"self_attn: {attn.num_heads} heads of {attn.head_dim} do not make {attn.embed_dim}"
    if layer.drop_path is not None:
        why = _own_forward(layer.drop_path, "DropPath")
        if why:
            return why
    return _experts(layer) or _ffns(layer)


def _experts(layer: nn.Module) -> str | None:
    """Projections and norms of both experts."""
    norms = [path for path in _NORMS if child_at(layer, path) is not None]
    for path in (*_LINEARS, *norms, "ffn"):
        why = _multiway(layer, path)
        if why:
            return why
    for path in _LINEARS:
        why = plain(layer, f"{path}.A", nn.Linear) or plain(layer, f"{path}.B", nn.Linear)
        if why:
            return why
    for path in norms:
        why = _norms(layer, path)
        if why:
            return why
    return None


def _ffns(layer: nn.Module) -> str | None:
    a, b = layer.ffn.A, layer.ffn.B
    for e, ffn in (("A", a), ("B", b)):
        why = _own_forward(ffn, "FeedForwardNetwork")
        if why:
            return f"ffn.{e}: {why}"
        if activation(ffn) is None:
            return f"ffn.{e}: the kernels do not have its activation {ffn.activation_fn!r}"
        why = plain(layer, f"ffn.{e}.fc1", nn.Linear) or plain(layer, f"ffn.{e}.fc2", nn.Linear)
        if why:
            return why
    if activation(a) != activation(b):
        return f"ffn: the experts' activations differ, {activation(a)} and {activation(b)}"
    if (a.ffn_layernorm is None) != (b.ffn_layernorm is None):
        return "ffn: one expert alone has a ffn_layernorm"
    if a.ffn_layernorm is None:
        return None
    return _norm_pair(layer, "ffn.A.ffn_layernorm", "ffn.B.ffn_layernorm")


def _multiway(owner: nn.Module, path: str) -> str | None:
    """Both experts must be behind torchscale's own split by position, along the tokens."""
    module = child_at(owner, path)
    why = _own_forward(module, "MultiwayNetwork")
    if why:
        return f"{path}: {why}"
    return None if module.dim == 1 else f"{path} splits dimension {module.dim}, not the tokens"


def _norms(owner: nn.Module, path: str) -> str | None:
    return _norm_pair(owner, f"{path}.A", f"{path}.B")


def _norm_pair(owner: nn.Module, a: str, b: str) -> str | None:
    for path in (a, b):
        norm = child_at(owner, path)
        # torchscale takes apex's class where there is one; it has the same parameters.
        fused = type(norm).__name__ == "FusedLayerNorm"
        why = plain(owner, path, type(norm) if fused else nn.LayerNorm)
        if why:
            return why
    eps = child_at(owner, a).eps, child_at(owner, b).eps
    return None if eps[0] == eps[1] else f"{a} and {b} have different eps, {eps[0]} and {eps[1]}"


def _own_forward(module: nn.Module | None, name: str) -> str | None:
    """A subclass that computes something else, or a wrapper."""
    cls = type(module)
    if _defines(cls, "forward", name):
        return None
    return f"{cls.__name__} has another forward than torchscale's {name}"


@torch.compiler.assume_constant_result
def _defines(cls: type, method: str, name: str) -> bool:
    """Whether a class takes a method from the class called `name`: torchscale is never imported."""
    return getattr(getattr(cls, method, None), "__qualname__", "") == f"{name}.{method}"
