"""Row gather in the interpreter, on odd shapes, with red zones around what it reads and writes."""

from __future__ import annotations

import pytest
import torch

from tests.common.red_zone import red_zones
from vlmo_kernels.kernels import pack

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]


def plain(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    out = source.new_zeros(index.shape[0], source.shape[1])
    live = index >= 0
    out[live] = source[index[live].long()]
    return out


def numbers(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(rows, columns) * 100).to(dtype)


def some_index(size: int, rows: int) -> torch.Tensor:
    """`rows` distinct rows of `size`, as far as there are any, the rest -1, shuffled."""
    index = torch.full((rows,), -1, dtype=torch.int32)
    count = min(size, rows) * 2 // 3 + (size > 0)
    index[:count] = torch.randperm(size)[:count].int()
    return index[torch.randperm(rows)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "columns", "rows"), [(7, 5, 9), (1, 1, 1), (40, 34, 33), (3, 1030, 5), (70, 768, 65)]
)
def test_gathers(size: int, columns: int, rows: int, dtype: torch.dtype) -> None:
    source, index = numbers(size, columns, dtype), some_index(size, rows)
    out = pack.gather_rows(source, index)
    assert out.dtype == dtype and out.is_contiguous()
    assert torch.equal(out, plain(source, index))


def test_there_and_back() -> None:
    x, index = torch.randn(12, 6), torch.tensor([4, 2, -1, 0, 11, -1], dtype=torch.int32)
    inverse = torch.full((12,), -1, dtype=torch.int32)
    inverse[index[index >= 0].long()] = torch.arange(6, dtype=torch.int32)[index >= 0]
    back = pack.gather_rows(pack.gather_rows(x, index), inverse)
    kept = (inverse >= 0)[:, None]
    assert torch.equal(back, torch.where(kept, x, 0.0))


@pytest.mark.parametrize(("size", "columns", "rows"), [(0, 4, 3), (4, 4, 0), (4, 0, 3), (0, 0, 0)])
def test_nothing_to_gather(size: int, columns: int, rows: int) -> None:
    out = pack.gather_rows(torch.randn(size, columns), torch.full((rows,), -1, dtype=torch.int32))
    assert torch.equal(out, torch.zeros(rows, columns))


def test_strided_source_and_poison_around_it() -> None:
    buffer = torch.full((9, 64), torch.nan)
    source = buffer[1:8, 3:40]
    source.copy_(torch.randn(7, 37))
    index = some_index(7, 10)
    assert torch.equal(pack.gather_rows(source, index), plain(source, index))
    columns_first = torch.randn(37, 7).t()
    assert torch.equal(pack.gather_rows(columns_first, index), plain(columns_first, index))


def test_writes_all_of_its_output_and_nothing_else() -> None:
    source, index = torch.randn(7, 37), some_index(7, 10)
    with red_zones():
        out = pack.gather_rows(source, index)
    assert torch.equal(out, plain(source, index))
