"""`gather_rows`: the one row copy, used by pack and unpack; the gradient of each is the other."""

from __future__ import annotations

import torch

from .runtime.library import define

define("gather_rows(Tensor x, Tensor index, Tensor inverse) -> Tensor")


def gather_rows(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`y[i] = x[index[i]]`, zero where the index is -1. Differentiable.

    Args:
        x: `[S, D]`.
        index: int32 `[R]`, rows of `x`, each at most once, or -1.
        inverse: int32 `[S]`, where each row of `x` went, or -1: the gradient gathers through it.

    Returns:
        `[R, D]`, dtype of `x`.
    """
    return torch.ops.vlmo_kernels.gather_rows(x, index, inverse)


def _gather(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    if x.is_cuda:
        from .kernels import pack

        return pack.gather_rows(x, index)
    if x.shape[0] == 0:
        return x.new_zeros(index.shape[0], x.shape[1])
    y = x.index_select(0, index.clamp(min=0))
    return y.index_fill_(0, (index < 0).nonzero().view(-1), 0.0)  # few rows: a masked fill would pass over all


def _meta(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


def _setup(ctx, inputs, output) -> None:
    _, index, inverse = inputs
    ctx.save_for_backward(index, inverse)


def _backward(ctx, grad: torch.Tensor):
    index, inverse = ctx.saved_tensors
    return gather_rows(grad.contiguous(), inverse, index), None, None


torch.library.impl("vlmo_kernels::gather_rows", "CompositeExplicitAutograd")(_gather)
torch.library.register_fake("vlmo_kernels::gather_rows")(_meta)
torch.library.register_autograd("vlmo_kernels::gather_rows", _backward, setup_context=_setup)
