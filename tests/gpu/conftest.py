"""GPU tests are marked `gpu` and run by `make gpu-correctness`; elsewhere they are deselected, not skipped.

GPU_SHARD=i/n keeps every n-th test, so that several processes share the work: most of it is compiling kernels.
"""

from __future__ import annotations

import os
import pathlib

import pytest
import torch

from tests.gpu.device import DEVICE

HERE = pathlib.Path(__file__).parent

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import bf16_fix

    bf16_fix.install()


def pytest_configure(config: pytest.Config) -> None:
    # the interpreter of Triton 3.6 does so at every `range` over a tensor
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in pathlib.Path(item.fspath).parents]
    for item in mine:
        item.add_marker(pytest.mark.gpu)
    shard, count = map(int, os.environ.get("GPU_SHARD", "0/1").split("/"))
    left = [item for i, item in enumerate(mine) if i % count != shard]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def full_fp32():
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def leave_memory():
    """Several processes share one GPU: what a test has cached is given back."""
    yield
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
