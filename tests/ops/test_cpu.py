"""`impl="cpu"` errs no more than eager torch does in the same dtype: every op, gradient, dtype and case."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import vlmo_kernels as vk
from tests.common.agreement import assert_problem_as_eager
from tests.common.cases import CASES
from tests.common.numerics import assert_close_as_eager
from tests.common.problems import PROBLEMS, Problem, supported
from vlmo_kernels.cpu import dense
from vlmo_kernels.runtime import compiled

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


@pytest.mark.parametrize("dtype", (torch.float16, torch.float64), ids=str)
def test_what_is_not_taken_falls_back_to_the_reference(dtype: torch.dtype) -> None:
    """fp64 always, fp16 where only oneDNN is there."""
    layout = vk.ModalityLayout.from_lengths({"text": 3})
    found = vk.explain("routed_linear", torch.ones(3, 4, dtype=dtype), [torch.ones(2, 4, dtype=dtype)], None, layout)
    if dtype == torch.float16 and dense.why_not() is None:
        assert found.chosen == "cpu" and "compiled kernels" in found.how
    else:
        assert found.chosen == "reference" and str(dtype) in found.rejected["cpu"]


@pytest.mark.parametrize("kind", ("layer", "rms"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_norm_with_a_wider_residual(kind: str, dtype: torch.dtype) -> None:
    """The residual may have any floating dtype; in fp64 the sum and its gradient are those of the reference."""
    layout = vk.ModalityLayout.from_lengths({"text": 3, "image": 2})
    x, residual = torch.randn(5, 8).to(dtype), torch.randn(5, 8, dtype=torch.float64)
    found = []
    for impl in ("auto", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, residual, torch.ones(8))]
        y, z = vk.routed_norm(leaves[0], [leaves[2]] * 2, None, layout, kind=kind, residual=leaves[1], impl=impl)
        torch.autograd.backward([y, z], [x, residual])
        found.append([y, z, *(t.grad for t in leaves)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_a_residual_of_any_dtype(dtype: torch.dtype) -> None:
    """The sum has the residual's dtype, and one of fp64 its digits."""
    layout = vk.ModalityLayout.from_lengths({"text": 40, "image": 30})
    x, w = torch.randn(70, 64), torch.randn(64, 64) / 8
    residual = (torch.randn(70, 64, dtype=torch.float64) * 1e3).to(dtype)
    linear = vk.routed_linear(x, [w, w], None, layout, residual=residual)
    ffn = vk.routed_ffn(x, [w, w], None, [w, w], None, layout, residual=residual)
    for name, y, branch in (
        ("linear", linear, lambda x, w: x @ w.T),
        ("ffn", ffn, lambda x, w: F.gelu(x @ w.T) @ w.T),
    ):
        right = residual.double() + branch(x.double(), w.double())
        assert_close_as_eager(y, right, (residual + branch(x, w)).to(dtype), name)


def test_choosing_an_implementation_computes_nothing() -> None:
    """Only metadata decides: under FakeTensorMode, as tools that trace a model use it, no value can be read."""
    layout = vk.ModalityLayout.from_lengths({"text": 3})
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.ones(3, 4))
        assert vk.routed_linear(x, [torch.ones(2, 4)], None, layout).shape == (3, 2)


def test_a_hidden_width_of_nothing() -> None:
    layout = vk.ModalityLayout.from_lengths({"text": 3})
    x, b2 = torch.randn(3, 4), torch.randn(4)
    y = vk.routed_ffn(x, [torch.empty(0, 4)], None, [torch.empty(4, 0)], [b2], layout, residual=x)
    assert torch.equal(y, x + b2)


def test_a_prefix_may_be_a_view() -> None:
    """Kernels read it as a table: a column of another tensor, or one number expanded, becomes one first."""
    layout = vk.ModalityLayout.from_lengths({"text": [4, 3, 6]})
    qkv = torch.randn(13, 3, 2, 8)
    for prefix in (torch.tensor([[2, 9], [0, 9], [3, 9]]).int()[:, 0], torch.tensor(2).int().expand(3)):
        for impl in ("auto", "reference"):
            view, copy = (
                vk.shared_attention(qkv, None, None, layout, causal=True, prefix=p, impl=impl)
                for p in (prefix, prefix.clone(memory_format=torch.contiguous_format))
            )
            assert torch.equal(view, copy)


def test_a_default_device_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `torch.set_default_device("cuda")` lengths and CPU tensors stay where they are; meta stands for it."""
    qkv = torch.randn(12, 3, 2, 8)
    bias = torch.randn(2, 7, 7)
    for parts in ("compiled", "torch's own"):
        if parts != "compiled":
            monkeypatch.setattr(compiled, "cpu_ops", lambda: None)
            monkeypatch.setattr(compiled, "host_planner", lambda: None)
        with torch.device("meta"):
            layout = vk.ModalityLayout.from_lengths({"text": [3, 2], "image": [4, 3]})
            leaf = qkv.clone().requires_grad_()
            y = vk.shared_attention(leaf, None, None, layout, bias=bias, causal=True)
            y.backward(torch.ones_like(y))
        assert layout.device == y.device == leaf.grad.device == qkv.device
        assert y.isfinite().all() and leaf.grad.isfinite().all()
