"""The compiled CPU attention on every instruction set this machine has: shapes, masks, threads, red zones."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import vlmo_kernels as vk
from tests.common.agreement import to_magnitude_one
from tests.common.attention import Case, Problem, check, results
from tests.common.numerics import assert_close_as_eager
from tests.common.red_zone import red_zones
from vlmo_kernels.cpu import shared_attention as cpu
from vlmo_kernels.runtime import compiled

ROOT = Path(__file__).resolve().parents[2]
OPS = compiled.cpu_ops()
built = pytest.mark.skipif(OPS is None, reason=f"vlmo_kernels_cpu: {compiled.why_not('vlmo_kernels_cpu')}")
NAMES = ("portable", "avx2", "avx512", "avx512bf16", "amx")  # ascending, as csrc/include/vlmo_kernels/cpu_isa.h

PAIRS = ((5, 11), (0, 0), (3, 0), (0, 11), (1, 0), (7, 11))
CASES = {
    "one token": Case(((1, 0),), bias="fp32"),
    "empty samples": Case(((0, 0), (2, 3), (0, 0)), bias="fp32"),
    "around a vector": Case(((15, 0), (16, 0), (17, 0), (31, 0), (33, 0)), bias="fp32"),
    "a pair of VLMo": Case(((40, 197), (12, 197)), head_dim=64, bias="same", text_room=40, dtype=torch.bfloat16),
    "two key blocks, two query chunks": Case(((3, 300), (270, 0)), heads=1, kv_heads=1, bias="fp32"),
    "two key blocks of bf16": Case(((3, 300), (270, 0)), 1, 1, 64, "same", dtype=torch.bfloat16),
    "causal over blocks": Case(((10, 590),), 2, 1, causal=True, dtype=torch.bfloat16),
    "causal, any order": Case(((10, 290), (70, 0)), 1, 1, causal=True, shuffled=True),
    "prefix": Case(PAIRS, causal=True, prefix=True, text_room=9),
    "bias that hides keys": Case(PAIRS, bias="hiding", text_room=9),
    "bias that hides keys, bf16": Case(PAIRS, bias="hiding", text_room=9, dtype=torch.bfloat16),
    "scattered positions": Case(((40, 100), (5, 100)), bias="fp32", text_room=41, shuffled=True),
    "grouped queries": Case(PAIRS, heads=6, kv_heads=2, bias="fp32", text_room=9),
    "one key head": Case(((5, 70),), heads=3, kv_heads=1, causal=True, dtype=torch.bfloat16),
    "many samples": Case(((3, 5),) * 40, heads=1, kv_heads=1, bias="fp32"),
    "everything": Case(((9, 60), (2, 60)), 4, 2, 24, "hiding", True, True, text_room=12, shuffled=True),
    "everything, fp16": Case(
        ((9, 60), (2, 60)), 4, 2, 24, "hiding", True, True, text_room=12, shuffled=True, dtype=torch.float16
    ),
    "bias of fp32 beside fp16": Case(PAIRS, bias="fp32", text_room=9, dtype=torch.float16),
    **{
        f"head {dim}, {str(dtype).removeprefix('torch.')}": Case(((5, 30), (7, 0)), head_dim=dim, dtype=dtype)
        for dim in (1, 8, 33, 34, 40, 64, 88, 96, 128, 256)
        for dtype in (torch.float32, torch.bfloat16)
    },
}  # fmt: skip


def instruction_sets() -> tuple[str, ...]:
    return NAMES[: OPS.isa() + 1] if OPS else ()


HERE = instruction_sets()


def run(problem: Problem) -> tuple:
    out = tuple(torch.full_like(t, torch.nan) for t in (problem.q, problem.k, problem.v))
    o, lse = problem.forward(cpu)
    return o, lse, *out, problem.backward(cpu, o, lse, out)


@lru_cache
def problem_of(case: str) -> Problem:
    torch.manual_seed(0)
    return Problem(CASES[case])


@built
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_fp64(dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cases of a dtype are judged together: the largest of a few errors is chance."""
    if name not in HERE:
        pytest.skip(f"this processor has no {name}")
    monkeypatch.setenv("VLMO_KERNELS_ISA", name)
    assert NAMES[OPS.isa()] == name
    pools: dict[str, list[list[torch.Tensor]]] = {}
    for case in CASES:
        if CASES[case].dtype == dtype:
            problem = problem_of(case)
            with red_zones():
                got = run(problem)
            for what, (mine, right, plain) in results(problem, got).items():
                assert mine.shape == right.shape and mine.dtype == plain.dtype, f"{case}: {what}"
                factor = to_magnitude_one(right)
                pools.setdefault(what, []).append([(t * factor).flatten() for t in (mine, right, plain)])
    for what, pool in pools.items():
        assert_close_as_eager(*(torch.cat(parts) for parts in zip(*pool, strict=True)), what)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_at_every_run_and_thread_count(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = tuple((3 + i % 9, 20 + 31 * (i % 4)) for i in range(14))
    problem = Problem(Case(samples, 2, 1, 34, "fp32", text_room=12, dtype=dtype))
    threads = torch.get_num_threads()
    for name in HERE:
        monkeypatch.setenv("VLMO_KERNELS_ISA", name)
        results = []
        try:
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                results.append(run(problem))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a[: problem.live], b[: problem.live]) for a, b in zip(results[0], other))


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_inf_stay_in_their_sample(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(Case(((5, 11), (4, 11), (6, 11)), 2, 2, 24, "fp32", text_room=9, dtype=dtype))
    problem.bias = None
    at = problem.seqs.cu_seqlens.tolist()
    bad = problem.seqs.rows[at[1] : at[2]].long()
    good = torch.cat([problem.seqs.rows[: at[1]], problem.seqs.rows[at[2] : at[3]]]).long()
    for name in HERE:
        monkeypatch.setenv("VLMO_KERNELS_ISA", name)
        clean = run(problem)
        for poison in (math.nan, math.inf, 1e-40):
            saved = {n: getattr(problem, n).clone() for n in ("q", "k", "v", "do")}
            for n in saved:
                getattr(problem, n)[bad] = poison
            dirty = run(problem)
            for n, t in saved.items():
                setattr(problem, n, t)
            for a, b in zip((clean[0], *clean[2:5]), (dirty[0], *dirty[2:5])):
                assert torch.equal(a[good], b[good])
                assert math.isfinite(poison) or b[bad].isnan().all()
            assert torch.equal(clean[1][:, good], dirty[1][:, good])


@built
def test_views_of_one_qkv_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(Case(PAIRS, head_dim=20, bias="fp32", text_room=9))
    tokens, heads, head_dim = problem.q.shape
    for name in HERE:
        monkeypatch.setenv("VLMO_KERNELS_ISA", name)
        qkv = torch.full((tokens, 3, heads, head_dim + 6), torch.nan)
        dqkv = qkv.clone()
        views = [qkv[:, i, :, 3:-3] for i in range(3)]
        for view, t in zip(views, (problem.q, problem.k, problem.v), strict=True):
            view.copy_(t)
        problem.q, problem.k, problem.v = views
        out = tuple(dqkv[:, i, :, 3:-3] for i in range(3))
        o, lse = problem.forward(cpu)
        check(problem, (o, lse, *out, problem.backward(cpu, o, lse, out)))
        assert dqkv[..., :3].isnan().all() and dqkv[..., -3:].isnan().all(), "written outside the gradients"


@built
def test_a_row_of_finfo_min_attends_to_all_keys_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(Case(((0, 9),), bias="fp32"))
    problem.bias[:, 2] = torch.finfo(torch.float32).min
    for name in HERE:
        monkeypatch.setenv("VLMO_KERNELS_ISA", name)
        torch.testing.assert_close(problem.forward(cpu)[0][2], problem.v.mean(0))


@built
@pytest.mark.parametrize(
    ("field", "at", "value", "message"),
    [
        ("cu_seqlens", 1, 99, "must ascend"),
        ("cu_seqlens", -1, 2**20, "ends at 1048576 of"),
        ("rows", 3, -1, "`rows` must be 0 to"),
        ("rows", 3, 10**6, "`rows` must be 0 to"),
        ("positions", 0, 10**6, "`positions` must be 0 to"),
        ("positions", 0, -5, "`positions` must be 0 to"),
    ],
)
def test_corrupt_tables_are_refused(field: str, at: int, value: int, message: str) -> None:
    """Memory is never read through a table that leads outside it."""
    problem = Problem(Case(PAIRS, bias="fp32", text_room=9))
    table = getattr(problem.seqs, field).clone()
    table[at] = value
    problem.seqs = replace(problem.seqs, **{field: table})
    with pytest.raises(RuntimeError, match=message):
        problem.forward(cpu)


@built
def test_explain_names_the_kernels() -> None:
    layout = vk.ModalityLayout.from_lengths({"text": 3})
    found = vk.explain("shared_attention", torch.ones(3, 3, 1, 4), None, None, layout)
    assert found.chosen == "cpu" and found.how == f"compiled kernels ({compiled.instructions()})"
    assert str(found).endswith(f"\n  cpu runs {found.how}")


@pytest.mark.slow
def test_without_the_compiled_part() -> None:
    """The same contract through torch's own ops, and `explain` says why."""
    program = (
        "import torch, vlmo_kernels as vk; layout = vk.ModalityLayout.from_lengths({'text': 3}); "
        "print(vk.explain('shared_attention', torch.ones(3, 3, 1, 4), None, None, layout))"
    )
    environment = {**os.environ, "VLMO_KERNELS_COMPILED": "0"}
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "torch's flash attention" in said.stdout and "VLMO_KERNELS_COMPILED=0" in said.stdout, said.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_cpu.py", "-k", "bias"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
