"""`impl="cpu"` errs no more than eager torch does in the same dtype: every op, gradient, dtype and case."""

from __future__ import annotations

import pytest
import torch

import vlmo_kernels as vk
from tests.common.agreement import assert_problem_as_eager
from tests.common.cases import CASES
from tests.common.problems import PROBLEMS, Problem, supported

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_is_as_close_as_eager(name: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]
    if not supported(problem, dtype, "cpu"):
        refuses_with_reason(problem, dtype)
        return
    for static in (False, True):
        assert_problem_as_eager(problem, CASES.values(), dtype, impl="cpu", static=static)


def refuses_with_reason(problem: Problem, dtype: torch.dtype) -> None:
    """What the path cannot take it says, and `auto` takes the reference."""
    case = CASES["mixed_kinds"]
    leaves = problem.leaves(case, dtype)
    with pytest.raises(RuntimeError, match=r"no implementation can run impl='cpu' .*Hint: impl='reference'"):
        problem.ours(leaves, case, case.layout(), "cpu")
    problem.ours(leaves, case, case.layout(), "auto")


def test_fp16_and_fp64_fall_back_to_the_reference() -> None:
    layout = vk.ModalityLayout.from_lengths({"text": 3})
    for dtype in (torch.float16, torch.float64):
        x = torch.ones(3, 4, dtype=dtype)
        found = vk.explain("routed_linear", x, [torch.ones(2, 4, dtype=dtype)], None, layout)
        assert found.chosen == "reference" and str(dtype) in found.rejected["cpu"]
