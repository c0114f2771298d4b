"""What training puts around a block: autocast, activation checkpointing, torch.compile, FSDP2."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from tests.common.numerics import assert_close_as_eager
from tests.gpu.device import DEVICE, gradients, make_block, make_layout, rows_for
from vlmo_kernels.bench import block as suite
from vlmo_kernels.bench.baselines import PaddedBlock, attend_published
from vlmo_kernels.bench.cases import CASES, make_batch


def test_autocast() -> None:
    """fp32 weights and residual stream, products in bf16; no further from fp64 than the padded eager block."""
    case = CASES["smoke"]
    batch, block = make_batch(case, DEVICE, torch.float32), suite._module(case, DEVICE, torch.float32)
    for part in (block.norm1, block.attn, block.attn.qkv, block.attn.proj, block.norm2, block.ffn):
        part.impl = "triton"
    eager = PaddedBlock(block, case.text_length, attend_published)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = block(batch.x, batch.layout, batch.bias)
        plain = batch.packed(eager(batch.padded(batch.x), batch.mask, batch.bias))
    double = copy.deepcopy(eager).double()
    exact = batch.packed(double(batch.padded(batch.x.double()), batch.mask, batch.bias.double()))
    assert y.dtype == torch.float32
    assert_close_as_eager(y, exact, plain.float(), "autocast")
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in block.parameters())


def test_activation_checkpointing() -> None:
    block, layout = make_block(), make_layout()
    x, dy = rows_for(layout).requires_grad_(), rows_for(layout, seed=2)
    leaves = [x, *block.parameters()]

    def checkpointed(x, layout):
        return checkpoint(block, x, layout, use_reentrant=False)

    for a, b in zip(gradients(block, leaves, layout, x, dy), gradients(checkpointed, leaves, layout, x, dy)):
        assert torch.equal(a, b)


def test_compiled_block_equals_eager() -> None:
    """Bit by bit, once Inductor rounds between fused operations as eager torch does (gradients are added up)."""
    block, layout = make_block(), make_layout()
    x, dy = rows_for(layout).requires_grad_(), rows_for(layout, seed=2)
    leaves = [x, *block.parameters()]
    with torch._inductor.config.patch(emulate_precision_casts=True):
        found = gradients(torch.compile(block, fullgraph=True), leaves, layout, x, dy)
    for a, b in zip(gradients(block, leaves, layout, x, dy), found, strict=True):
        assert torch.equal(a, b)


def test_fsdp2_on_one_process() -> None:
    """Three steps of SGD on sharded parameters are those of the plain block, bit by bit."""
    from torch.distributed.fsdp import fully_shard

    layout = make_layout()
    x, dy = rows_for(layout), rows_for(layout, seed=2)
    plain, sharded = make_block(), make_block()
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh(DEVICE, (1,))
        fully_shard(sharded, mesh=mesh)
        for block in (plain, sharded):
            optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                block(x, layout).backward(dy)
                optimizer.step()
        for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
            assert torch.equal(a, b.full_tensor())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("recompute", ["activation", "full"])
def test_a_small_block_is_clean(recompute: str) -> None:
    """One step, short enough for compute-sanitizer."""
    block, layout = make_block(), make_layout(samples=3)
    block.ffn.recompute = recompute
    x = rows_for(layout).requires_grad_()
    block(x, layout).sum().backward()
    assert x.grad.isfinite().all()
