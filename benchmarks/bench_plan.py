"""The planners, compiled and in torch: `pytest benchmarks/bench_plan.py`; see README.md."""

import random

import pytest
import torch

from vlmo_kernels import ModalityLayout
from vlmo_kernels.plan import plan, plan_in_torch
from vlmo_kernels.runtime import compiled

SAMPLES = 4096
TEXT = [random.Random(0).randint(1, 40) for _ in range(SAMPLES)]
BATCHES = {"texts": {"text": TEXT}, "pairs": {"text": TEXT, "image": 197}}


def same(a: ModalityLayout, b: ModalityLayout) -> bool:
    names = ("cu_seqlens", "rows", "positions", "sample_of_row", "group_offsets", "row_of_token")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("route", ["compiled", "torch"])
def test_lengths_on_the_host(benchmark, monkeypatch, route: str, batch: str) -> None:
    """`ModalityLayout.from_lengths` of 4,096 samples: lists in, tensors out."""
    if compiled.host_planner() is None:
        pytest.skip(compiled.why_not("host_planner"))
    found = ModalityLayout.from_lengths(BATCHES[batch])
    if route == "torch":
        monkeypatch.setattr(compiled, "host_planner", lambda: None)
        assert same(found, ModalityLayout.from_lengths(BATCHES[batch]))
    benchmark.extra_info.update(tokens=found.tokens)
    rounds = 200 if route == "compiled" else 3
    benchmark.pedantic(ModalityLayout.from_lengths, (BATCHES[batch],), rounds=rounds, warmup_rounds=2)


@pytest.mark.parametrize("samples", [16, 1024])
@pytest.mark.parametrize("route", ["compiled", "torch"])
def test_ids_with_a_mask(benchmark, route: str, samples: int) -> None:
    """Modality ids and padding mask `[samples, 237]` to tables, on the CPU."""
    if compiled.cpu_ops() is None:
        pytest.skip(compiled.why_not("vlmo_kernels_cpu"))
    ids = (torch.arange(237) >= 40).long().expand(samples, 237)
    mask = torch.rand(samples, 237, generator=torch.Generator().manual_seed(0)) < 0.9
    function = plan if route == "compiled" else plan_in_torch
    assert all(torch.equal(a, b) for a, b in zip(plan(ids, mask, 2), plan_in_torch(ids, mask, 2)))
    benchmark.pedantic(function, (ids, mask, 2), rounds=50 if route == "compiled" else 5, warmup_rounds=2)
