"""The checker: what it lets through and what it catches."""

from __future__ import annotations

import pytest
import torch

from tests.common.numerics import assert_close_as_eager

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def product(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 48).to(dtype)
    return a.double() @ b.double(), a @ b, (a.float() @ b.float()).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accepts_eager_and_better(dtype: torch.dtype) -> None:
    expected, eager, wide = product(dtype)
    assert_close_as_eager(eager, expected, eager)
    assert_close_as_eager(wide, expected, eager)
    assert_close_as_eager(expected.to(dtype), expected, eager)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda y: y * 1.01, "RMS error"),
        (lambda y: y + 0.1 * y.std(), "worst at"),
        (lambda y: torch.cat([y[:-1], torch.zeros_like(y[:1])]), "max error"),
        (lambda y: y.index_fill(0, torch.tensor(3), torch.nan), "NaN in 48 places"),
        (lambda y: y.index_fill(0, torch.tensor(3), -torch.inf), r"-inf in 48 places"),
        (lambda y: y[:4], "shape"),
        (lambda y: y.double(), "dtype"),
    ],
)
def test_catches(dtype: torch.dtype, wrong, message: str) -> None:
    expected, eager, _ = product(dtype)
    with pytest.raises(AssertionError, match=message):
        assert_close_as_eager(wrong(eager), expected, eager, "product")


def test_scalars_empty_and_integers() -> None:
    assert_close_as_eager(torch.tensor(2.0), torch.tensor(2.0).double(), torch.tensor(2.0))
    assert_close_as_eager(torch.zeros(0, 3), torch.zeros(0, 3).double(), torch.zeros(0, 3))
    whole = torch.arange(3)
    assert_close_as_eager(whole, whole.double(), whole)
    with pytest.raises(AssertionError, match="integers"):
        assert_close_as_eager(whole + 1, whole.double(), whole)
    with pytest.raises(AssertionError, match="worst at"):
        assert_close_as_eager(torch.tensor(2.1), torch.tensor(2.0).double(), torch.tensor(2.0))
