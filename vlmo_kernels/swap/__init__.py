"""`swap(model)`: the kernels in an existing model, instance by instance."""

from __future__ import annotations

from torch import nn

from . import instance
from .report import SwapReport

__all__ = ["SwapReport", "swap"]


def swap(model: nn.Module) -> SwapReport:
    """Let the kernels compute every block of a known family in `model`.

    Recognised by structure and parameter names, never by import: VLMo blocks (the official classes and
    `vlmo`), `vlmo`'s encoder loop, and torchscale's BEiT-3 encoder. The deepest part that is safe is taken:
    where one block of an encoder has to be left alone, the others are replaced one by one. Parameters are
    shared, the state dict does not change, other instances of the same classes are not touched. Call the
    model as before, with its own masks and padding; padding is not computed, and padded outputs are zero.

    Args:
        model: any module; changed in place.

    Returns:
        A report: what was replaced, what was recognised but left alone and why, and `undo()`.

    Raises:
        TypeError: `model` is no module.
        ValueError: nothing was replaced; the message says why.

    Example:
        >>> report = swap(model)  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
        >>> report.undo()  # doctest: +SKIP
    """
    from . import beit3, vlmo

    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: `model` must be a torch.nn.Module, got {type(model).__name__}")
    report = SwapReport()
    inside: list[str] = []  # paths whose inside belongs to a replaced part
    swapped_before = False
    for path, module in model.named_modules():
        if any(path == p or path.startswith(p + ".") for p in inside):
            continue
        if instance.is_swapped(module):
            swapped_before = True
            inside.append(path)
            continue
        for recognises, adapter, what in (*vlmo.ADAPTERS, *beit3.ADAPTERS):
            if not recognises(module):
                continue
            why = adapter.check(module)
            if why:
                report.left[path] = why
            else:
                instance.apply(module, adapter)
                report.replaced[path] = what
                report._modules.append(module)
                inside.append(path)
    if report.replaced:
        return report
    if report.left:
        reasons = "; ".join(f"{path or 'model'}: {why}" for path, why in report.left.items())
        raise ValueError(f"swap: every recognised block was left alone ({reasons})")
    if swapped_before:
        raise ValueError(
            f"swap: `model` must not be swapped already, {type(model).__name__} is. Hint: report.undo() first"
        )
    raise ValueError(
        f"swap: `model` must contain VLMo blocks or a BEiT-3 (torchscale) encoder, found none in "
        f"{type(model).__name__}. Hint: build blocks from vlmo_kernels.modules instead"
    )
