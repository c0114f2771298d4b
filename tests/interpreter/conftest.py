"""The kernels in Triton's interpreter, on CPU tensors.

Triton decides at import whether it compiles or interprets, so these tests need a process of their own:
`TRITON_INTERPRET=1 pytest tests/interpreter`. `tests/test_interpreter.py` starts one; without the variable
nothing is collected here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]

root = str(Path(__file__).resolve().parents[2])
if root not in sys.path:  # `from tests.common ...` and vlmo_kernels, also from a bare checkout
    sys.path.insert(0, root)

if INTERPRETING:
    from tests.interpreter import bf16_fix

    bf16_fix.install()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    import torch

    torch.manual_seed(0)
