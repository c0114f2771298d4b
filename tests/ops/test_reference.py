"""The references say what is right: their gradients are the derivatives of their values, and both are eager's.

Level 2: fp64 `gradcheck` of every public op and variant, and fp64 agreement with an independent eager version.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from tests.common.cases import CASES, Case
from tests.common.numerics import assert_close_as_eager
from tests.common.problems import PROBLEMS

# Small enough for finite differences: padding, several kinds of samples, an idle expert, a repeated run.
TINY = Case("tiny", "", ((("text", 1), ("image", 2), ("text", 1)), (("image", 2),)))


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_are_derivatives(name: str) -> None:
    problem = PROBLEMS[name]
    leaves = problem.leaves(TINY, torch.float64)
    trained = {name: t for name, t in leaves.items() if t.requires_grad}
    layout = TINY.layout()

    def function(*values: torch.Tensor):
        return problem.ours(leaves | dict(zip(trained, values, strict=True)), TINY, layout, "reference")

    # fast_mode compares random projections of the Jacobian: the whole of it takes minutes.
    assert gradcheck(function, tuple(trained.values()), fast_mode=True)


@pytest.mark.parametrize("static", [False, True], ids=["exact", "static"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_reference_is_eager_in_fp64(name: str, static: bool) -> None:
    problem = PROBLEMS[name]
    for case in CASES.values():
        leaves = problem.leaves(case, torch.float64)
        expected, expected_grads = problem.run(problem.eager, leaves, case)
        values, grads = problem.run(problem.ours, leaves, case, case.layout(static), "reference")
        for i, (value, right) in enumerate(zip(values, expected, strict=True)):
            assert_close_as_eager(value, right, right, f"{case.name} output {i}")
        for leaf, right in expected_grads.items():
            # Beside 1: a gradient that cancels to zero has no magnitude to measure rounding errors by.
            right = torch.zeros_like(leaves[leaf]) if right is None else right
            both = [torch.cat([t.flatten(), torch.ones_like(t).flatten()]) for t in (grads[leaf], right)]
            assert_close_as_eager(*both, both[1], f"{case.name} gradient of {leaf}")
