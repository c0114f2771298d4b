"""The rule of `numerics`, applied to a whole problem: its outputs and the gradient of every leaf.

The largest of a few errors is chance. So the errors of one result are judged together over all cases,
seeds and experts, each tensor first brought to the same magnitude by a power of two, which rounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import product

import torch

from .cases import Case
from .numerics import FLOOR_EPS, assert_close_as_eager
from .problems import Outputs, Problem, in_fp64

ZERO = FLOOR_EPS[torch.float64][0] * torch.finfo(torch.float64).eps  # what fp64 cannot tell from zero


def assert_problem_as_eager(
    problem: Problem, cases: Iterable[Case], dtype: torch.dtype, ours: Callable[..., Outputs] | None = None,
    impl: str = "reference", static: bool = False, seeds: int = 3,
) -> None:  # fmt: skip
    """Assert that results and gradients are as close to the fp64 reference as eager torch is.

    Args:
        problem: op and variant.
        cases: the batches.
        dtype: of the leaves.
        ours: a function in place of `problem.ours`, to test the checker with.
        impl: implementation under test.
        static: plan with dead rows.
        seeds: how often every case is drawn.
    """
    failures = []
    for name, (actual, expected, eager) in compared(problem, cases, dtype, ours, impl, static, seeds).items():
        try:
            assert_close_as_eager(actual, expected, eager, name)
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, "\n".join([f"{problem} in {dtype}:", *failures])


def compared(
    problem: Problem, cases: Iterable[Case], dtype: torch.dtype, ours: Callable[..., Outputs] | None,
    impl: str, static: bool, seeds: int,
) -> dict[str, list[torch.Tensor]]:  # fmt: skip
    """Result name to flat (actual, fp64 reference, eager) of all cases and experts."""
    pools: dict[str, list[list[torch.Tensor]]] = {}

    def add(name: str, what: str, actual: torch.Tensor, expected: torch.Tensor, eager: torch.Tensor) -> None:
        assert actual.shape == eager.shape, f"{what}: shape {tuple(actual.shape)}, eager {tuple(eager.shape)}"
        assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, eager {eager.dtype}"
        factor = to_magnitude_one(expected)
        pools.setdefault(name, []).append([(t * factor).flatten() for t in (actual, expected, eager)])

    for case, seed in product(cases, range(seeds)):
        leaves, (expected, right), (unfused, unfused_grads) = _measure(problem, case, dtype, seed)
        values, grads = problem.run(ours or problem.ours, leaves, case, case.layout(static), impl)
        for i, three in enumerate(zip(values, expected, unfused, strict=True)):
            add(f"output {i}", f"{case.name} output {i}", *three)
        for leaf in grads:
            what = f"{case.name} gradient of {leaf}"
            assert grads[leaf] is not None, f"{what}: an expert without tokens must get zeros, not None"
            eager = torch.zeros_like(leaves[leaf]) if unfused_grads[leaf] is None else unfused_grads[leaf]
            add(f"gradient of {leaf.partition('.')[0]}", what, grads[leaf], right[leaf], eager)
    return {name: [torch.cat(parts) for parts in zip(*pool, strict=True)] for name, pool in pools.items()}


@lru_cache(maxsize=64)
def _measure(problem: Problem, case: Case, dtype: torch.dtype, seed: int):
    """Leaves, the fp64 reference and eager's results: the same for every implementation and mutant."""
    leaves = problem.leaves(case, dtype, seed)
    expected = problem.run(problem.ours, in_fp64(leaves), case, case.layout(), "reference")
    return leaves, expected, problem.run(problem.eager, leaves, case)


def to_magnitude_one(expected: torch.Tensor) -> float:
    """A power of two. A result that cancels to zero has no magnitude; it stands beside leaves of order 1."""
    finite = expected[torch.isfinite(expected)]
    if not (finite.abs() > ZERO).any():
        return 1.0
    return 2.0 ** -round(math.log2(float(finite.square().mean().sqrt())))
