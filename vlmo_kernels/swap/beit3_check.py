"""Which BEiT-3 encoders the kernels can compute, and why not the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .instance import has_hooks, is_swapped

_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_NORMS = ("self_attn_layer_norm", "final_layer_norm", "self_attn.inner_attn_ln")
_ACTIVATIONS = (("gelu", F.gelu), ("relu", F.relu), ("silu", F.silu))


def recognises(module: nn.Module) -> bool:
    """Whether a module has the parts of a multiway encoder, under their names."""
    layers = module._modules.get("layers")
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(module, "forward_embedding"):
        return False
    attn = getattr(layers[0], "self_attn", None)  # also through a wrapper, to name it in the report
    return all(isinstance(_at(attn, f"{p.partition('.')[2]}.{e}"), nn.Module) for p in _LINEARS for e in "AB")


def why_not(encoder: nn.Module) -> str | None:
    """Why the kernels would not compute what this encoder computes, or None."""
    cls = type(encoder)._made_of[1] if is_swapped(encoder) else type(encoder)
    if "forward" in vars(encoder) or not _defines(cls, "forward", "Encoder"):
        return f"{cls.__name__} has another forward than torchscale's Encoder"
    if getattr(encoder, "relative_position", None) is not None:
        return "relative_position: the kernels have no bias by buckets"
    if encoder.layer_norm is not None:
        why = _untouched(encoder.layer_norm, "layer_norm")
        why = why or _multiway(encoder, "layer_norm") or _norms(encoder, "layer_norm")
        if why:
            return why
    for i, layer in enumerate(encoder.layers):
        why = _untouched(layer, f"layers.{i}")
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
    norms = [path for path in _NORMS if _at(layer, path) is not None]
    for path in (*_LINEARS, *norms, "ffn"):
        why = _multiway(layer, path)
        if why:
            return why
    for path in _LINEARS:
        why = _plain(layer, f"{path}.A", nn.Linear) or _plain(layer, f"{path}.B", nn.Linear)
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
        why = _plain(layer, f"ffn.{e}.fc1", nn.Linear) or _plain(layer, f"ffn.{e}.fc2", nn.Linear)
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
    module = _at(owner, path)
    why = _own_forward(module, "MultiwayNetwork")
    if why:
        return f"{path}: {why}"
    return None if module.dim == 1 else f"{path} splits dimension {module.dim}, not the tokens"


def _norms(owner: nn.Module, path: str) -> str | None:
    return _norm_pair(owner, f"{path}.A", f"{path}.B")


def _norm_pair(owner: nn.Module, a: str, b: str) -> str | None:
    for path in (a, b):
        norm = _at(owner, path)
        # torchscale takes apex's class where there is one; it has the same parameters.
        fused = type(norm).__name__ == "FusedLayerNorm"
        why = _plain(owner, path, type(norm) if fused else nn.LayerNorm)
        if why:
            return why
    eps = _at(owner, a).eps, _at(owner, b).eps
    return None if eps[0] == eps[1] else f"{a} and {b} have different eps, {eps[0]} and {eps[1]}"


def _plain(owner: nn.Module, path: str, kind: type) -> str | None:
    """The kernels take a child's weight and never call it: it must be a plain `kind` with a plain weight."""
    child = _at(owner, path)
    if type(child) is not kind:
        given = "missing" if child is None else f"a {type(child).__name__}, not a plain {kind.__name__}"
        return f"{path} is {given} (adapter, parametrisation or quantisation?)"
    weight = child._parameters.get("weight")
    if weight is None:
        return f"{path} has no weight of its own"
    if not weight.is_floating_point() or is_traceable_wrapper_subclass(weight):
        return f"{path}.weight is quantised or sharded ({type(weight).__name__}, {weight.dtype})"
    return None


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


def _untouched(root: nn.Module, name: str) -> str | None:
    """Hooks, patched forwards and dropout anywhere inside: the kernels call none of these modules."""
    for path, module in walk(root, name):
        if has_hooks(module):
            return f"{path} carries hooks, which the kernels would not run"
        if "forward" in vars(module):
            return f"{path} has a patched forward (activation checkpointing or offloading?)"
        if isinstance(module, nn.Dropout) and module.p > 0.0:
            return f"{path} has dropout {module.p}, which the kernels do not apply"
    return None


def walk(root: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """All modules with their paths, as `named_modules` but several times faster: this runs in every call."""
    found = [(name, root)]
    for path, module in found:
        found += [(f"{path}.{n}", child) for n, child in module._modules.items() if child is not None]
    return found


def _at(module: nn.Module | None, path: str) -> nn.Module | None:
    """The child at a dotted path, or None."""
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module
