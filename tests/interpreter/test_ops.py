"""The public ops on the Triton kernels: every variant, output and gradient by the rule, dead rows included."""

from __future__ import annotations

import pytest
import torch

from tests.common.agreement import assert_problem_as_eager
from tests.common.cases import CASES
from tests.common.problems import PROBLEMS

SHORT = ("one_token", "mixed_kinds")


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_variant_in_fp32(name: str) -> None:
    cases = [CASES[case] for case in SHORT]
    assert_problem_as_eager(PROBLEMS[name], cases, torch.float32, impl="triton", static=True, seeds=1)
