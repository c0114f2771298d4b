"""What the pytest-benchmark entry points share. They time the suites of `vlmo_kernels.bench`."""

import importlib
import os

import pytest

from vlmo_kernels.bench.cases import CASES
from vlmo_kernels.bench.flops import useful
from vlmo_kernels.bench.harness import Clock, gate, run_forward, run_training
from vlmo_kernels.bench.run import DTYPES

CASE = os.environ.get("BENCH_CASE", "smoke")
DEVICE = os.environ.get("BENCH_DEVICE", "cpu")
DTYPE = os.environ.get("BENCH_DTYPE", "fp32")
NAMES = {
    "block": ("eager", "sdpa", "compile", "ours", "ours_frozen"),
    "ffn": ("split", "masks", "compile", "grouped_mm", "ours", "ours_frozen"),
    "attention": ("eager", "sdpa", "compile", "flex", "xformers", "ours"),
}


def contestants_of(suite: str) -> list[tuple[str, str]]:
    """(contestant, pass) of a suite."""
    only_forward = ("ours_frozen", "grouped_mm")
    return [(n, p) for p in ("forward", "training") for n in NAMES[suite] if p == "forward" or n not in only_forward]


def name_of(entry: tuple[str, str]) -> str:
    return "-".join(entry)


def timed(benchmark, suite: str, entry: tuple[str, str]) -> None:
    """Judge one contestant, then let pytest-benchmark time it. Interleaving needs `vlmo-kernels bench`."""
    name, pass_ = entry
    module = importlib.import_module(f"vlmo_kernels.bench.{suite}")
    contestants, expected = module.build(CASES[CASE], DEVICE, DTYPES[DTYPE], pass_)
    found = {c.name: c for c in contestants}
    if name not in found:
        pytest.skip(f"this torch has no {name}")
    racing = [found[module.EAGER]] + ([found[name]] if name != module.EAGER else [])
    result = gate(racing, expected, pass_, module.EAGER)[-1]
    if result.skipped.startswith(("failed", "not here")) and not name.startswith("ours"):
        pytest.skip(result.skipped)
    assert not result.skipped, result.skipped
    gflop = useful(suite, CASES[CASE], pass_) / 1e9
    benchmark.extra_info.update(case=CASE, dtype=DTYPE, max_err=result.verdict.max_err, gflop=gflop)
    run = run_forward if pass_ == "forward" else run_training
    clock = Clock(DEVICE)
    with racing[-1].scope():
        benchmark.pedantic(lambda: clock(lambda: run(racing[-1])), rounds=5, warmup_rounds=1)
