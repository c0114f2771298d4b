"""What training needs of torch.distributed; every function also works in a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather(t: Tensor) -> Tensor:
    """[n, ...] of every process, one after the other: [world * n, ...]. All must have one n. Without gradient."""
    if world_size() == 1:
        return t
    parts = [torch.empty_like(t) for _ in range(world_size())]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts)


def gather_object(value: object) -> list[object]:
    """What every process gave, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    everyone: list[object] = [None] * world_size()
    dist.all_gather_object(everyone, value)
    return everyone


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t: Tensor) -> Tensor:
        ctx.own = slice(rank() * len(t), (rank() + 1) * len(t))
        return gather(t)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)  # another user of it must not see the sum
        dist.all_reduce(grad)
        return grad[ctx.own]


def gather_with_grad(t: Tensor) -> Tensor:
    """Like `gather`; the gradients of all processes' losses come back, summed."""
    return t if world_size() == 1 else _GatherWithGrad.apply(t)


def global_mean(total: Tensor, count: int) -> Tensor:
    """The mean over all processes' elements of which this one has `count`, summing to `total`.

    Its gradient, averaged over processes as DDP and FSDP do, is that of the mean over all elements. The value
    is this process's part of it.
    """
    # Filled on the device: a copy from the host would wait for all work queued there.
    count = torch.full((), count, device=total.device, dtype=torch.float32)
    if world_size() > 1:
        dist.all_reduce(count)
    return total * (world_size() / count.clamp(min=1.0))
