"""Attention kernels in the interpreter: odd shapes, every mask and route, poisoned dead rows, red zones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.common.attention import Case, Problem, check
from tests.common.numerics import assert_close_as_eager
from tests.common.red_zone import red_zones
from vlmo_kernels import ModalityLayout, shared_attention
from vlmo_kernels.kernels import shared_attention as kernels

ARCHS = (80, 90, 100, 120)
LONG = 4096  # a bound on the sample length that rules the short backward out


@pytest.fixture(autouse=True)
def fp32_dots_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 `tl.dot` adds up in the order of K, whatever the tile, as IEEE dots do on a GPU.

    The interpreter's BLAS sums in an order that depends on the tile's shape, so the backward's scores are
    not the forward's to the last bit and no longer cancel against its log-sum-exp: at head_dim 20 that
    makes the RMS error of dv 1.33x eager's (mean of 12 seeds), in order it is 1.01x.
    """
    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar != tl.float32:
            return original(self, a, b, d, input_precision, max_num_imprecise_acc)
        total = d.data
        for k in range(a.data.shape[-1]):
            product = a.data[:, k, None].astype(np.float64) * b.data[None, k]
            total = (total + product).astype(np.float32)
        return TensorHandle(total, tl.float32)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


PAIRS = ((5, 11), (0, 0), (3, 0), (0, 11), (1, 0), (7, 11))
CASES = {
    "one token": Case(((1, 0),)),
    "empty samples": Case(((0, 0), (2, 3), (0, 0))),
    "pairs": Case(PAIRS, text_room=9),
    "head 34": Case(PAIRS, head_dim=34),
    "head 8": Case(PAIRS, head_dim=8, bias="fp32", text_room=9),
    "head 88": Case(PAIRS, head_dim=88, bound=LONG, dtype=torch.bfloat16),
    "head 256": Case(((3, 20),), heads=1, kv_heads=1, head_dim=256, dtype=torch.bfloat16),
    "several tiles": Case(((3, 130), (70, 0)), head_dim=40),
    "bias": Case(PAIRS, bias="fp32", text_room=9),
    "bias, several tiles": Case(((40, 100), (5, 100)), heads=1, kv_heads=1, bias="fp32", text_room=41),
    "bias, long route": Case(((9, 70), (2, 70)), heads=1, kv_heads=1, bias="fp32", bound=LONG),
    "bias of bf16": Case(PAIRS, bias="same", text_room=9, dtype=torch.bfloat16),
    "bias of fp32 beside bf16": Case(PAIRS, bias="fp32", text_room=9, dtype=torch.bfloat16),
    "bias that hides keys": Case(PAIRS, bias="hiding", text_room=9),
    "bias that hides keys, long": Case(PAIRS, bias="hiding", bound=LONG),
    "causal": Case(PAIRS, causal=True, text_room=9),
    "causal, several tiles": Case(((10, 90), (70, 0)), heads=1, kv_heads=1, causal=True, bound=LONG),
    "causal, any order": Case(((10, 90), (70, 0)), 1, 1, causal=True, bound=LONG, shuffled=True),
    "causal with prefix": Case(PAIRS, causal=True, prefix=True, text_room=9),
    "prefix, long": Case(((9, 90), (70, 0)), heads=1, kv_heads=1, causal=True, prefix=True, bound=LONG),
    "everything": Case(
        ((9, 60), (2, 60)), 4, 2, 24, "hiding", True, True, text_room=12, shuffled=True, dtype=torch.float16
    ),
    "grouped queries": Case(PAIRS, heads=6, kv_heads=2, text_room=9),
    "one key head": Case(((5, 70),), heads=3, kv_heads=1, causal=True, dtype=torch.bfloat16),
    "tiles owned by length": Case(((3, 150), *((2, 0),) * 9), heads=1, kv_heads=1),
    "short route, 256 rows": Case(((30, 150),), heads=1, kv_heads=1, bias="fp32", dtype=torch.bfloat16),
    "bf16": Case(PAIRS, dtype=torch.bfloat16),
    "bf16, long route": Case(((9, 140),), bound=LONG, dtype=torch.bfloat16),
    "fp16": Case(PAIRS, bias="same", causal=True, dtype=torch.float16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_fp64(case: Case) -> None:
    problem = Problem(case)
    out = tuple(torch.full_like(t, torch.nan) for t in (problem.q, problem.k, problem.v))
    with red_zones():
        o, lse = problem.forward(kernels)
        dbias = problem.backward(kernels, o, lse, out)
    assert o.is_contiguous() and lse.dtype == torch.float32
    check(problem, (o, lse, *out, dbias))


@pytest.mark.parametrize("bound", [None, LONG], ids=["short", "long"])
def test_views_of_one_qkv_buffer(bound: int | None) -> None:
    problem = Problem(Case(PAIRS, head_dim=20, text_room=9, bound=bound))
    tokens, heads, head_dim = problem.q.shape
    qkv = torch.full((tokens, 3, heads, head_dim + 6), torch.nan)
    dqkv = qkv.clone()
    views = [qkv[:, i, :, 3:-3] for i in range(3)]
    for view, t in zip(views, (problem.q, problem.k, problem.v), strict=True):
        view.copy_(t)
    problem.q, problem.k, problem.v = views
    out = tuple(dqkv[:, i, :, 3:-3] for i in range(3))
    o, lse = problem.forward(kernels)
    dbias = problem.backward(kernels, o, lse, out)
    check(problem, (o, lse, *out, dbias))
    assert dqkv[..., :3].isnan().all() and dqkv[..., -3:].isnan().all(), "written outside the gradients"


def test_any_strides() -> None:
    problem = Problem(Case(PAIRS, bias="fp32", text_room=9))
    for name in ("q", "k", "v", "do"):
        scattered = getattr(problem, name).permute(2, 1, 0).contiguous().permute(2, 1, 0)
        assert scattered.stride(-1) != 1
        setattr(problem, name, scattered)
    problem.bias = problem.bias.transpose(1, 2)
    out = tuple(torch.full_like(t, torch.nan) for t in (problem.q, problem.k, problem.v))
    o, lse = problem.forward(kernels)
    dbias = problem.backward(kernels, o, lse, out)
    assert o.is_contiguous() and dbias.is_contiguous()
    check(problem, (o, lse, *out, dbias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_finite_masks_of_any_size(dtype: torch.dtype) -> None:
    """A row of finfo.min attends to all keys alike, as torch.softmax has it; it must not overflow to -inf.

    Against torch, not the reference: its log-sum-exp cannot hold finfo.min + log(n).
    """
    problem = Problem(Case(((0, 9),), bias="fp32", dtype=dtype))
    problem.bias[:, 2] = torch.finfo(torch.float32).min
    row = 2
    expected = problem.v.double().mean(0)
    plain = problem.v.mean(0)
    assert_close_as_eager(problem.forward(kernels)[0][row], expected, plain, "o")


@pytest.mark.parametrize(
    "samples", [(), ((0, 0),), ((0, 0), (0, 0))], ids=["no sample", "one empty", "all empty"]
)
@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_live(samples, tokens: int) -> None:
    ids = torch.full((len(samples), 3), -1)
    seqs = ModalityLayout.from_modality_ids(ids, modalities=("text", "image")).sequences()
    table = torch.zeros(tokens, dtype=torch.int32)
    seqs = replace(seqs, rows=table, positions=table)
    q = torch.full((tokens, 2, 16), torch.nan)
    bias = torch.randn(2, 3, 3)
    o, lse = kernels.forward(q, q, q, seqs, bias, False, None, 0.25)
    assert o.shape == q.shape and lse.shape == (2, tokens)
    out = tuple(torch.full_like(q, torch.nan) for _ in range(3))
    dbias = kernels.backward(q, q, q, q, o, lse, seqs, bias, False, None, 0.25, True, out)
    assert not any(t.any() for t in (*out, dbias))


def test_another_samples_infinities_stay_there() -> None:
    problem = Problem(Case(((5, 11), (7, 3)), text_room=9, bias="fp32"))
    first = problem.seqs.rows[:16].long()
    keep = problem.seqs.rows[16 : problem.live].long()
    clean = problem.forward(kernels)[0][keep]
    problem.v[first] = torch.inf
    problem.k[first] = torch.nan
    assert torch.equal(problem.forward(kernels)[0][keep], clean)


def test_one_compiled_kernel_whatever_the_lengths() -> None:
    """Configurations and constants depend on length by bucket only; the grid on capacity only."""
    for kernel in ("fwd", "dq", "dkdv", "short", "dbias"):
        for arch in ARCHS:
            for low, high in ((1, 64), (65, 128), (129, 256), (257, 100_000)):
                configs = {
                    kernels.config_for(kernel, 2, 64, n, bias=True, arch=arch)
                    for n in (low, (low + high) // 2, high)
                }
                assert len(configs) == 1, (kernel, configs)
    assert kernels._tiles(1000, 10, 200, 64) == (25, 0)
    assert kernels._tiles(2000, 10, 200, 64) == (40, 4)


@pytest.mark.parametrize("head_dim", [1, 16, 34, 40, 64, 88, 96, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_head_dim_has_a_configuration(head_dim: int, itemsize: int) -> None:
    for kernel in ("fwd", "dq", "dkdv", "dbias"):
        for arch in ARCHS:
            assert kernels.config_for(kernel, itemsize, head_dim, 500, bias=True, arch=arch)


def test_a_wider_head_is_refused() -> None:
    layout = ModalityLayout.from_lengths({"text": [2], "image": 3})
    with pytest.raises(NotImplementedError, match="at most 256 elements, got 264"):
        shared_attention(torch.zeros(5, 3, 1, 264), None, None, layout, impl="triton")
