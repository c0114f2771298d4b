"""The cuBLAS route in the interpreter: torch's products, and the pointwise kernels by the same comparisons."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.interpreter import test_routed_ffn as ffn
from tests.interpreter import test_routed_linear as linear
from vlmo_kernels.kernels import cublas, gemm, gemm_grad, shared_attention
from vlmo_kernels.runtime.sequences import Sequences
from vlmo_kernels.tuning import tables

KERNELS = ("gemm", "gemm gated", "input grad", "input grad activated", "input grad gated", "weight grad")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def forced():
    with tables.forced(dict.fromkeys(KERNELS, tables.CUBLAS)):
        yield


@pytest.fixture
def no_fused_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((gemm, "gemm_kernel"), (gemm_grad, "input_grad_kernel")):
        monkeypatch.setattr(module, name, None)


def with_host_lengths(case):
    case.route = replace(case.route, host_offsets=case.route.offsets)
    return case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ["three experts", "dead rows", "expert twice"])
def test_linear(route: str, dtype: torch.dtype, no_fused_gemm) -> None:
    linear.compare(with_host_lengths(linear.Case(route, 40, 37, dtype, full=True, residual=dtype)))


@pytest.mark.parametrize("route", ["one token", "nothing live", "unused expert", "expert twice"])
def test_linear_without_epilogue(route: str, no_fused_gemm) -> None:
    linear.compare(with_host_lengths(linear.Case(route, 20, 12, torch.float32)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_ffn(activation: str, dtype: torch.dtype, no_fused_gemm) -> None:
    case = ffn.Case("dead rows", dtype, activation, d=20, f=20, gamma=True, drop=True)
    ffn.compare(with_host_lengths(case))


def test_ffn_with_inner_norm(no_fused_gemm) -> None:
    ffn.compare(with_host_lengths(ffn.Case("empty expert", torch.float32, "gelu", d=20, f=20, norm=True)))


def test_lengths_on_the_device_stay_on_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    case = linear.Case("dead rows", 20, 12, torch.float32, full=True)
    monkeypatch.setattr(cublas, "gemm", None)
    monkeypatch.setattr(cublas, "input_grad", None)
    linear.compare(case)


def test_a_measured_tile_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, BM, BN, BK, **rest: seen.append((BM, BN, BK))

    monkeypatch.setattr(gemm, "gemm_kernel", Recorder())
    case = linear.Case("dead rows", 20, 12, torch.float32)
    with tables.forced({"gemm": (64, 16, 16, 4, 2)}):
        case.forward(linear.routed_linear)
    assert seen == [(64, 16, 16)]


def test_a_measured_attention_route() -> None:
    """A table may send short samples to the two kernels ("long"); a tile that is too short is not taken."""
    q, seqs = torch.empty(4, 2, 16), Sequences(*[torch.empty(0)] * 3, max_seqlen=60)
    heuristic = shared_attention.config_for("short", 4, 16, 60, bias=False, arch=90)
    for measured, taken in (("long", None), ((64, 16, 4, 1), (64, 16, 4, 1)), ((32, 16, 4, 1), heuristic)):
        with tables.forced({"attention short": measured}):
            assert shared_attention._config("short", q, seqs, None, False) == taken


def test_experts_partly_frozen() -> None:
    case = with_host_lengths(linear.Case("three experts", 20, 12, torch.float32))
    everything = case.backward(linear.routed_linear)
    some = case.backward(linear.routed_linear, need=(False, True, False))
    assert some["dw0"] is None and some["dw2"] is None and torch.equal(some["dw1"], everything["dw1"])
