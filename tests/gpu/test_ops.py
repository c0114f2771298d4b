"""Every op on the GPU: every variant, output and gradient against fp64, in the dtypes the kernels take.

The cases hold what kernels trip over: no tokens at all, one token, samples of one token run, experts without rows.
"""

from __future__ import annotations

import pytest
import torch

import vlmo_kernels as vk
from tests.common.agreement import assert_problem_as_eager
from tests.common.cases import CASES, Case
from tests.common.problems import PROBLEMS
from tests.gpu.device import DEVICE, SMALL, through_descriptors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device(problem):
    """The problem's own function, on the device; leaves and results stay where the checker has them."""

    def ours(leaves, case: Case, layout: vk.ModalityLayout, impl: str):
        with torch.device(DEVICE):
            moved = {name: t.to(DEVICE) for name, t in leaves.items()}
            return tuple(o.cpu() for o in problem.ours(moved, case, layout.to(DEVICE), impl))

    return ours


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_close_as_eager(name: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]
    cases = [CASES["one_token"], CASES["mixed_kinds"]] if SMALL else CASES.values()
    assert_problem_as_eager(
        problem, cases, dtype, ours=on_device(problem), impl="triton", static=True, seeds=1 if SMALL else 3
    )


@pytest.mark.parametrize(
    "name",
    ["routed_linear-plain", "routed_linear-epilogue", "routed_ffn-swiglu", "routed_ffn-full", "routed_ffn-gated_full"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_close_as_eager_through_descriptors(name: str, dtype: torch.dtype) -> None:
    """The same with TMA in every product (widths here are multiples of 16 bytes), on tiles that their ends cut."""
    tile = (32, 32, 32, 4, 2) if SMALL else (64, 64, 32, 4, 3)
    parts = dict.fromkeys(("gemm", "input grad", "input grad activated"), 2)
    parts |= dict.fromkeys(("gemm gated", "input grad gated"), 4)
    with through_descriptors({kernel: (*tile, n, None, True) for kernel, n in parts.items()}):
        test_as_close_as_eager(name, dtype)


@pytest.mark.parametrize("name", ["routed_linear-epilogue", "routed_ffn-gated_full", "shared_attention-prefix_bias"])
def test_tf32_is_used_only_where_it_is_allowed(name: str) -> None:
    """"highest" must be fp32 to the last bits; "high" must run, and differ (on a GPU)."""
    problem, case = PROBLEMS[name], CASES["pair"]
    leaves, layout = problem.leaves(case, torch.float32), case.layout()
    found = {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        found[precision] = problem.run(on_device(problem), leaves, case, layout, "triton")[0]
    assert SMALL or any(not torch.equal(a, b) for a, b in zip(found["highest"], found["high"], strict=True))


def test_without_a_usable_kernel_auto_refuses():
    layout = vk.ModalityLayout.from_lengths({"text": 3}, device="cuda")
    x = torch.ones(3, 4, device="cuda", dtype=torch.float64)
    with pytest.raises(RuntimeError, match="triton: has no kernels for torch.float64.*Hint: impl='reference'"):
        vk.routed_linear(x, [torch.ones(2, 4, device="cuda", dtype=torch.float64)], None, layout)
