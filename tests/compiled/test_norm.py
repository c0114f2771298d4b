"""The compiled CPU norms and row sums on every instruction set this machine has."""

from __future__ import annotations

import pytest
import torch

from tests.common.agreement import assert_problem_as_eager
from tests.common.cases import CASES
from tests.common.numerics import assert_close_as_eager
from tests.common.problems import PROBLEMS
from tests.common.red_zone import red_zones
from vlmo_kernels.cpu import routed_norm as cpu
from vlmo_kernels.cpu.onednn import column_sums
from vlmo_kernels.reference import routed_norm as reference
from vlmo_kernels.runtime import compiled
from vlmo_kernels.runtime.route import Route

OPS = compiled.cpu_ops()
NAMES = ("portable", "avx2", "avx512")  # ascending; the kernels of avx512 serve all above
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(OPS is None, reason=f"vlmo_kernels_cpu: {compiled.why_not('vlmo_kernels_cpu')}")


@pytest.fixture(params=NAMES)
def instructions(request, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VLMO_KERNELS_ISA", request.param)
    if OPS.isa() != NAMES.index(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["layer_residual", "rms", "rms1p_residual"])
def test_as_close_as_eager(kind: str, dtype: torch.dtype, instructions: str) -> None:
    assert_problem_as_eager(PROBLEMS[f"routed_norm-{kind}"], CASES.values(), dtype, impl="cpu", static=True, seeds=1)


def norm(module, kind: str, x, residual, w, b, dy, dz, dtype: torch.dtype):
    """y, z, dx, dw, db of one expert."""
    rows = x.shape[0]
    route = Route(torch.tensor([0, rows], dtype=torch.int32), None, ((0, 1, 0),))
    x, residual, w, b, dy, dz = (t.to(dtype) for t in (x, residual, w, b, dy, dz))
    y, z, mean, rstd = module.forward(x, residual, [w], [b], route, kind, 1e-5)
    dx, dw, db = module.backward(dy, dz, z, [w], [b], mean, rstd, route, kind, [True], [True])
    return y, z, dx, dw[0], db[0]


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 15), (63, 17), (65, 96), (130, 40)])
def test_shapes(rows: int, width: int, kind: str, instructions: str) -> None:
    """Vectors with a rest, blocks with a rest, rows that are longer than what is normalised."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, rows, width + 3, generator=generator)
    x, residual, dy, dz = wide[..., 1:-2]
    w, b = torch.randn(2, width, generator=generator)
    with red_zones():
        got = norm(cpu, kind, x, residual, w, b, dy.contiguous(), dz.contiguous(), torch.float32)
    arguments = (kind, x, residual, w, b, dy, dz)
    right, plain = norm(reference, *arguments, torch.float64), norm(reference, *arguments, torch.float32)
    for name, mine, expected, eager in zip(("y", "z", "dx", "dw", "db"), got, right, plain, strict=True):
        if width > 1:  # one number less its mean is 0, and its gradient is all rounding
            assert_close_as_eager(mine, expected, eager, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_sums(dtype: torch.dtype, instructions: str) -> None:
    for rows, width in ((0, 5), (1, 1), (64, 16), (129, 300)):
        x = torch.randn(rows, width + 2, generator=torch.Generator().manual_seed(0)).to(dtype)[:, 1:-1]
        assert_close_as_eager(column_sums(x), x.double().sum(0), x.sum(0, dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_at_every_thread_count(dtype: torch.dtype, instructions: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual, dy, dz = torch.randn(4, 700, 100, generator=generator)
    w, b = torch.randn(2, 100, generator=generator)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append((*norm(cpu, "layer", x, residual, w, b, dy, dz, dtype), column_sums(x.to(dtype))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_stays_in_its_row(instructions: str) -> None:
    x, residual, dy, dz = torch.ones(4, 5, 20) + torch.arange(20)
    x[2, 3] = torch.nan
    y, z, dx, *_ = norm(cpu, "layer", x, residual, torch.ones(20), torch.ones(20), dy, dz, torch.float32)
    for t in (y, dx):
        assert t[2].isnan().all() and t[[0, 1, 3, 4]].isfinite().all()
    assert z.isnan().sum() == 1
