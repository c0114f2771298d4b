"""Launches of a block, and that nothing a kernel is compiled for depends on the batch."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from vlmo_kernels import ModalityLayout, MoMEBlock

# Ops that only make metadata: no kernel runs for them on a GPU.
FREE = {"view", "unbind", "empty", "detach", "slice", "select", "as_strided", "_unsafe_view", "alias", "t", "transpose"}
FREE |= {"expand", "unsqueeze", "squeeze", "permute", "reshape", "empty_like", "new_empty", "split", "chunk"}


class Launches(TorchDispatchMode):
    """Records every Triton launch (grid and integer arguments) and every aten op that would launch one."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.triton: list[tuple] = []
        self.aten: list[str] = []
        original = GridExecutor.__call__

        def record(executor, *args, **kwargs):
            integers = [a for a in args if isinstance(a, (int, float, bool))]
            constants = {k: v for k, v in kwargs.items() if not isinstance(v, torch.Tensor)}
            self.triton.append((executor.fn.__name__, executor.grid, integers, constants))
            return original(executor, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", record)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in FREE:
            self.aten.append(name)
        return func(*args, **(kwargs or {}))


def make_block() -> MoMEBlock:
    torch.manual_seed(0)
    return MoMEBlock(32, 2, 48, impl="triton").eval()


def device_layout(seed: int) -> ModalityLayout:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2, (3, 11), generator=generator)
    mask = torch.rand(3, 11, generator=generator) < 0.8
    return ModalityLayout.from_modality_ids(ids, mask, modalities=("text", "image"))


def forward(block: MoMEBlock, seed: int) -> None:
    layout = device_layout(seed)
    block(torch.randn(layout.tokens, 32), layout)


def training(block: MoMEBlock, seed: int) -> None:
    layout = device_layout(seed)
    block(torch.randn(layout.tokens, 32).requires_grad_(), layout).backward(torch.randn(layout.tokens, 32))


def test_a_block_in_eval_is_seven_launches(monkeypatch):
    block, layout = make_block(), device_layout(0)
    x = torch.randn(layout.tokens, 32)
    with torch.no_grad(), Launches(monkeypatch) as seen:
        block(x, layout)
    assert len(seen.triton) + len(seen.aten) <= 7, (seen.triton, seen.aten)
    assert len(seen.triton) >= 5


@pytest.mark.parametrize("run", [forward, training])
def test_two_batches_launch_the_same(monkeypatch, run):
    block = make_block()
    recorded = []
    for seed in (1, 2):
        with monkeypatch.context() as patch, Launches(patch) as seen:
            run(block, seed)
        recorded.append(seen.triton)
    assert recorded[0] == recorded[1]
