"""Giving one module instance another forward, and taking it back.

The instance's class becomes a subclass of its own class and of the adapter. Its attributes, parameters,
hooks and `isinstance` stay as they were; other instances of the class are not touched; copies and pickles
keep the adapter.
"""

from __future__ import annotations

from functools import cache

from torch import nn


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


def not_plain(owner: nn.Module, path: str, kind: type) -> str | None:
    """Why a child cannot be read as a plain `kind`: the kernels take its weights and never call it."""
    child = owner
    for name in path.split("."):
        child = getattr(child, name, None)
        if child is None:
            return f"{path} is missing"
        if has_hooks(child):
            return f"{path if child is not owner else name} carries hooks, which the kernels would not run"
    if type(child) is not kind:
        return f"{path} is a {type(child).__name__}, not a plain {kind.__name__} (adapter or parametrisation?)"
    weight = child.weight
    if weight is not None and not weight.is_floating_point():
        return f"{path}.weight is quantised ({weight.dtype})"
    return None


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
