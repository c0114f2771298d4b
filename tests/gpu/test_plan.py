"""The device planner on the GPU: the tables of the plan in torch, launches, graphs, repeats."""

from __future__ import annotations

import pytest
import torch

from vlmo_kernels.plan import plan, plan_in_torch
from vlmo_kernels.runtime import compiled

pytestmark = pytest.mark.skipif(compiled.cuda_ops() is None, reason=f"{compiled.why_not('vlmo_kernels_cuda')}")


def batch(samples: int, length: int, modalities: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, modalities + 1, (samples, length), generator=generator)
    return ids.cuda(), (torch.rand(samples, length, generator=generator) < 0.8).cuda()


def assert_equal(ours, expected) -> None:
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("modalities", [1, 2, 3, 15, 16])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (7, 31), (8, 33), (64, 237), (4097, 40), (3, 5000)])
def test_is_the_plan_in_torch(shape: tuple[int, int], modalities: int) -> None:
    ids, mask = batch(*shape, modalities)
    for given in (None, mask, mask.double()):
        assert_equal(plan(ids, given, modalities), plan_in_torch(ids, given, modalities))
    transposed = ids.t().contiguous().t().int()
    assert_equal(plan(transposed, mask, modalities), plan_in_torch(ids, mask, modalities))


def test_two_launches_and_no_wait() -> None:
    ids, mask = batch(64, 237, 2)
    plan(ids, mask, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan(ids, mask, 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 2, kernels


def test_a_captured_plan_follows_its_inputs() -> None:
    ids, mask = batch(64, 237, 2)
    plan(ids, mask, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tables = plan(ids, mask, 2)
    for seed in (1, 2):
        for old, new in zip((ids, mask), batch(64, 237, 2, seed)):
            old.copy_(new)
        graph.replay()
        assert_equal(tables, plan_in_torch(ids, mask, 2))


def test_a_thousand_repeats_are_equal() -> None:
    ids, mask = batch(333, 61, 3)
    first = plan(ids, mask, 3)
    for _ in range(1000):
        assert_equal(plan(ids, mask, 3), first)
