"""Giving one module instance another forward, and taking it back.

The instance's class becomes a subclass of its own class and of the adapter. Its attributes, parameters,
hooks and `isinstance` stay as they were; other instances of the class are not touched; copies and pickles
keep the adapter.
"""

from __future__ import annotations

from functools import cache

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Swapped:
    """Mixin of every swapped instance. Subclasses define `forward` and `check`.

    `original_forward` calls the class's own forward.
    """

    @staticmethod
    def check(module: nn.Module) -> str | None:
        """Why this instance cannot be computed by the kernels now, or None."""
        raise NotImplementedError

    def original_forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        adapter, original = type(self)._made_of
        return _empty, (adapter, original), self.__dict__


@cache
def swapped_class(adapter: type, original: type) -> type:
    """The class of swapped instances of `original`; the same one every time, so that pickles load."""
    made = type(f"Swapped{original.__name__}", (adapter, original), {"_made_of": (adapter, original)})
    made.__module__ = original.__module__
    return made


def _empty(adapter: type, original: type):
    cls = swapped_class(adapter, original)
    return cls.__new__(cls)


def apply(module: nn.Module, adapter: type) -> None:
    module.__class__ = swapped_class(adapter, type(module))


def undo(module: nn.Module) -> None:
    module.__class__ = type(module)._made_of[1]


def is_swapped(module: nn.Module) -> bool:
    return isinstance(module, Swapped)


def plain(owner: nn.Module, path: str, kind: type) -> str | None:
    """The kernels take a child's weight and never call it: it must be a plain `kind` with a plain weight."""
    child = child_at(owner, path)
    if type(child) is not kind:
        given = "missing" if child is None else f"a {type(child).__name__}, not a plain {kind.__name__}"
        return f"{path} is {given} (adapter, parametrisation or quantisation?)"
    weight = child._parameters.get("weight")
    if weight is None:
        return f"{path} has no weight of its own"
    if not weight.is_floating_point() or is_traceable_wrapper_subclass(weight):
        return f"{path}.weight is quantised or sharded ({type(weight).__name__}, {weight.dtype})"
    return None


def untouched(root: nn.Module, name: str) -> str | None:
    """Hooks, patched forwards and active dropout anywhere inside: the kernels call none of these modules."""
    for path, module in walk(root, name):
        if has_hooks(module):
            return f"{path} carries hooks, which the kernels would not run"
        if "forward" in vars(module):
            return f"{path} has a patched forward (activation checkpointing or offloading?)"
        if isinstance(module, nn.Dropout) and module.p > 0.0 and module.training:
            return f"{path} has dropout {module.p} in training, which the kernels do not apply"
    return None


def walk(root: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """All modules with their paths, as `named_modules` but several times faster: this runs in every call."""
    found = [(name, root)]
    for path, module in found:
        found += [(f"{path}.{n}", child) for n, child in module._modules.items() if child is not None]
    return found


def child_at(module: nn.Module | None, path: str) -> nn.Module | None:
    """The child at a dotted path, or None."""
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
