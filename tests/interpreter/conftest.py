"""The kernels in Triton's interpreter, on CPU tensors.

Triton decides at import whether it compiles or interprets, so these tests need a process of their own:
`TRITON_INTERPRET=1 pytest tests/interpreter`. `tests/test_interpreter.py` starts one; without the variable
nothing is collected here.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]

if INTERPRETING:
    from tests.interpreter import bf16_fix

    bf16_fix.install()


def pytest_configure(config: pytest.Config) -> None:
    # the interpreter of Triton 3.6 does so at every `range` over a tensor
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
