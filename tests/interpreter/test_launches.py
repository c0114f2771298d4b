"""Launches of a block, and that nothing a kernel is compiled for depends on the batch."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.common.launches import record_launches
from vlmo_kernels import ModalityLayout, MoMEBlock

# What runs inside an op, out of sight of a dispatch mode around it.
INSIDE = {
    f"{name}{suffix}": (name, f"_{direction}")
    for name in ("routed_linear", "routed_norm", "routed_ffn")
    for suffix, direction in (("", "forward"), ("_backward", "backward"))
} | {
    "shared_attention_packed": ("shared_attention", "_packed_forward"),
    "shared_attention_packed_backward": ("shared_attention", "_packed_backward"),
}
# Ops that only make metadata: no kernel runs for them on a GPU (a `to` that copies comes again as `_to_copy`).
FREE = {"view", "unbind", "empty", "detach", "slice", "select", "as_strided", "_unsafe_view", "alias", "t", "transpose"}
FREE |= {"to", "expand", "unsqueeze", "squeeze", "permute", "reshape", "empty_like", "new_empty", "split", "chunk"}
FORWARD = [
    "norm_forward", "gemm_kernel", "attention_fwd_kernel", "gemm_kernel", "norm_forward", "gemm_kernel", "gemm_kernel"
]  # fmt: skip
BIAS = ["column_sums_kernel", "bias_grad_kernel"]
SCALED = ["weight_grad_kernel", "reduce_weight_grad_kernel", *BIAS]  # a weight before LayerScale
BACKWARD = [
    "input_grad_kernel", "bias_grad_kernel", *SCALED, "weight_grad_kernel", "input_grad_kernel",  # FFN
    "norm_backward", "norm_reduce",
    "input_grad_kernel", *SCALED, "attention_short_bwd_kernel", "input_grad_kernel", "weight_grad_kernel", *BIAS,
    "norm_backward", "norm_reduce",
]  # fmt: skip


class Launches(TorchDispatchMode):
    """Records every Triton launch (grid and integer arguments) and every aten op that would launch one."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.triton = record_launches(monkeypatch)
        self.aten: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "vlmo_kernels" and name in INSIDE:
            module, function = INSIDE[name]
            with self:
                return getattr(importlib.import_module(f"vlmo_kernels.ops.{module}"), function)(*args, **(kwargs or {}))
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
    assert [name for name, *_ in seen.triton] == FORWARD and not seen.aten, seen.aten


def test_launches_of_a_training_step(monkeypatch):
    """30 backward, as docs/mome_block.md says."""
    block, layout = make_block(), device_layout(0)
    x, dy = torch.randn(2, layout.tokens, 32).unbind(0)
    with Launches(monkeypatch) as seen:
        y = block(x.requires_grad_(), layout)
        assert [name for name, *_ in seen.triton] == FORWARD and not seen.aten, seen.aten
        seen.triton.clear()
        y.backward(dy)
    assert [name for name, *_ in seen.triton] == BACKWARD
    # gamma onto the three weights before it, zeroed row sums for the two dgammas, and the residual stream's sums
    assert sorted(seen.aten) == ["add"] * 3 + ["mul"] * 3 + ["new_zeros"] * 2


@pytest.mark.parametrize("run", [forward, training])
def test_two_batches_launch_the_same(monkeypatch, run):
    block = make_block()
    recorded = []
    for seed in (1, 2):
        with monkeypatch.context() as patch, Launches(patch) as seen:
            run(block, seed)
        recorded.append(seen.triton)
    assert recorded[0] == recorded[1]
