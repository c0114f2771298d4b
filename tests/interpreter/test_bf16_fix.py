"""The repaired interpreter: bf16 as on a GPU, or an error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.common.numerics import assert_close_as_eager
from tests.interpreter import bf16_fix

SIZE = 16


@triton.jit
def product(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee"))


@triton.jit
def select(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.where(at < 3, tl.load(a + at), tl.load(b + at)))


@triton.jit
def twice(a, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(a + at) + tl.load(a + at))


@triton.jit
def total(a, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(a + tl.arange(0, N)), 0))


def test_rounds_to_nearest_even() -> None:
    values = torch.randn(10000) * torch.exp(20 * torch.randn(10000))
    special = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 3.4e38, 1e-40, 1.00390625, 1.01171875])
    values = torch.cat([values, special])
    bits = bf16_fix.fp32_to_bf16(values.numpy())
    assert torch.equal(torch.from_numpy(bits.view(np.int16)), values.bfloat16().view(torch.int16))
    assert np.isnan(bf16_fix.bf16_to_fp32(bf16_fix.fp32_to_bf16(np.float32([np.nan])))).all()


def test_dot() -> None:
    a, b = torch.randn(2, SIZE, SIZE).bfloat16()
    out = torch.empty(SIZE, SIZE, dtype=torch.bfloat16)
    product[(1,)](a, b, out, SIZE)
    assert_close_as_eager(out, a.double() @ b.double(), a @ b)


def test_select_copies() -> None:
    a, b = torch.randn(2, SIZE).bfloat16()
    out = torch.empty_like(a)
    select[(1,)](a, b, out, SIZE)
    assert torch.equal(out, torch.where(torch.arange(SIZE) < 3, a, b))


@pytest.mark.parametrize("kernel", [twice, total])
def test_arithmetic_is_refused(kernel) -> None:
    a = torch.randn(SIZE).bfloat16()
    with pytest.raises(Exception, match="cast to fp32 first"):
        kernel[(1,)](a, torch.empty_like(a), SIZE)
