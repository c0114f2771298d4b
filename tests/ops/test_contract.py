"""Level 1: what every op promises whatever it computes, on every implementation that takes it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest
import torch

import vlmo_kernels as vk
from tests.common.cases import CASES, EXPERTS, Case
from tests.common.problems import PROBLEMS, Leaves, Problem, many, packed, supported

IMPLS = ("reference", "cpu")
# The variants with every argument, and those whose optional outputs are absent.
FULL = {
    "routed_linear": ("routed_linear-plain", "routed_linear-epilogue"),
    "routed_norm": ("routed_norm-layer_residual", "routed_norm-rms"),
    "routed_ffn": ("routed_ffn-full", "routed_ffn-gated_full", "routed_ffn-recompute"),
    "shared_attention": ("shared_attention-gqa", "shared_attention-prefix_bias"),
    "shared_attention_packed": ("shared_attention-packed", "shared_attention-packed_bias"),
}
VARIANTS = [name for names in FULL.values() for name in names]
SINGLE = [name for name in PROBLEMS if not name.startswith("mome_block")]  # what is not made of other ops


def taken(name: str, dtype: torch.dtype = torch.float32) -> list[str]:
    return [impl for impl in IMPLS if supported(PROBLEMS[name], dtype, impl)]


def permuted(t: torch.Tensor) -> torch.Tensor:
    """Equal values, dense, in another order of dimensions: a wrong stride in a fake shows here."""
    return t.detach().movedim(0, -1).contiguous().movedim(-1, 0).requires_grad_(t.requires_grad)


def offset(t: torch.Tensor) -> torch.Tensor:
    """Equal values, in a storage that starts elsewhere, rows longer than needed."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype)
    view = wide[..., 1:-2]
    view.copy_(t.detach())
    return view.requires_grad_(t.requires_grad)


MAKERS = {"compact": lambda t: t.detach().requires_grad_(), "permuted": permuted, "offset": offset}


def calls(problem: Problem, case: Case, make, impl: str, dtype: torch.dtype = torch.float32) -> list[tuple]:
    """The registered ops that one forward and backward runs, `(op, arguments)` with fresh arguments."""
    recorded = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "vlmo_kernels" and func._opname not in ("plan", "gather_rows"):
                recorded.append((func, args))
            return func(*args, **(kwargs or {}))

    leaves = problem.leaves(case, dtype)
    with Record():
        problem.run(problem.ours, leaves, case, case.layout(), impl)

    def fresh(value, backward: bool):
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return [fresh(t, backward) for t in value]
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
            return make(value).requires_grad_(not backward)
        return value.detach() if isinstance(value, torch.Tensor) else value

    return [(op, tuple(fresh(a, "backward" in op._opname) for a in args)) for op, args in recorded]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_opcheck(name: str, make: str) -> None:
    for impl in taken(name):
        for case in ("several_runs", "text_only", "no_tokens"):
            found = calls(PROBLEMS[name], CASES[case], MAKERS[make], impl)
            assert len(found) == 2, [op for op, _ in found]
            for op, args in found:
                torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", VARIANTS)
def test_opcheck_through_aot_autograd(name: str) -> None:
    for impl in taken(name):
        for op, args in calls(PROBLEMS[name], CASES["several_runs"], MAKERS["compact"], impl):
            utils = ["test_autograd_registration"]
            if "backward" not in op._opname:  # the derivative of a backward op raises
                utils.append("test_aot_dispatch_dynamic")
            torch.library.opcheck(op, args, test_utils=utils)


@pytest.mark.parametrize("name", ["no_tokens", "mixed_kinds", "alternating"])
def test_opcheck_of_plan_and_gather(name: str) -> None:
    layout = CASES[name].layout(static=True)
    torch.library.opcheck(torch.ops.vlmo_kernels.plan.default, (CASES[name].ids(), None, 2))
    tables = layout.token_of_row(), layout.row_of_token
    for make in MAKERS.values():
        x = make(torch.randn(CASES[name].ids().numel(), 3)).requires_grad_()
        torch.library.opcheck(torch.ops.vlmo_kernels.gather_rows.default, (x, *tables))


@pytest.mark.parametrize("make", ["permuted", "offset"])
@pytest.mark.parametrize("name", SINGLE)
def test_strides_do_not_matter(name: str, make: str) -> None:
    case, problem = CASES["mixed_kinds"], PROBLEMS[name]
    leaves = problem.leaves(case, torch.float32)
    for impl in taken(name):
        expected, grads = problem.run(problem.ours, leaves, case, case.layout(), impl)
        other = {k: MAKERS[make](t) if t.is_floating_point() else t for k, t in leaves.items()}
        values, other_grads = problem.run(problem.ours, other, case, case.layout(), impl)
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(other_grads, grads)
        assert all(v.is_contiguous() for v in values)


@pytest.mark.parametrize("name", PROBLEMS)
def test_nothing_is_written_into(name: str) -> None:
    case, problem = CASES["mixed_kinds"], PROBLEMS[name]
    leaves = problem.leaves(case, torch.float32)
    before = {k: t.detach().clone() for k, t in leaves.items()}
    for impl in taken(name):
        problem.run(problem.ours, leaves, case, case.layout(), impl)
        assert all(torch.equal(leaves[k], before[k]) for k in leaves)
        assert all(t._version == 0 for t in leaves.values() if t.requires_grad)


@pytest.mark.parametrize("name", PROBLEMS)
def test_an_idle_expert_gets_zeros(name: str) -> None:
    case, problem = CASES["text_only"], PROBLEMS[name]
    for impl in taken(name):
        leaves = problem.leaves(case, torch.float32)
        _, grads = problem.run(problem.ours, leaves, case, case.layout(), impl)
        for leaf, grad in grads.items():
            assert grad is not None and grad.dtype == leaves[leaf].dtype, leaf
            idle = leaf.partition(".")[2] in ("1", "2")
            assert torch.equal(grad, torch.zeros_like(grad)) if idle else bool(torch.isfinite(grad).all()), leaf


@pytest.mark.parametrize("name", VARIANTS)
def test_frozen_leaves_get_no_gradient(name: str) -> None:
    """One leaf at a time is trained; its gradient is the one of training them all."""
    case, problem = CASES["mixed_kinds"], PROBLEMS[name]
    for impl in taken(name):
        leaves = problem.leaves(case, torch.float32)
        outputs, grads = problem.run(problem.ours, leaves, case, case.layout(), impl)
        for leaf in grads:
            one = {k: t.detach().requires_grad_() if k == leaf else t.detach() for k, t in leaves.items()}
            values = problem.ours(one, case, case.layout(), impl)
            generator = torch.Generator().manual_seed(1)
            total = 0.0
            for v in values:
                cotangent = torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v)
                total = total + (v * cotangent).sum()
            total.backward()
            torch.testing.assert_close(one[leaf].grad, grads[leaf])
            assert all(t.grad is None for k, t in one.items() if k != leaf)


@pytest.mark.parametrize("name", VARIANTS)
def test_double_backward_raises(name: str) -> None:
    case, problem = CASES["one_token"], PROBLEMS[name]
    leaves = problem.leaves(case, torch.float32)
    x = next(iter(leaves.values()))
    (grad,) = torch.autograd.grad(
        problem.ours(leaves, case, case.layout(), "reference")[0].square().sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match=f"{problem.op}: double backward is not implemented"):
        grad.sum().backward()


# ---------------------------------------------------------------------------- dead rows


def poisoned(t: torch.Tensor, layout: vk.ModalityLayout) -> torch.Tensor:
    """`t` with NaN in the dead rows."""
    return torch.where((layout.sample_of_row >= 0).reshape(-1, *[1] * (t.dim() - 1)), t, torch.nan)


@pytest.mark.parametrize("name", SINGLE)
def test_dead_rows_do_not_matter(name: str, monkeypatch) -> None:
    """NaN in the dead rows of every packed input changes nothing; gradients are zero there."""
    case, problem = CASES["mixed_kinds"], PROBLEMS[name]
    layout = case.layout(static=True)
    for impl in taken(name):
        leaves = problem.leaves(case, torch.float32)
        expected, grads = problem.run(problem.ours, leaves, case, layout, impl)
        seen: list[torch.Tensor] = []

        def poison(t, layout=layout, seen=seen):
            if t is None:
                return None
            bad = poisoned(layout.pack_padded(t), layout)
            if t.requires_grad:
                bad.retain_grad()
                seen.append(bad)
            return bad

        monkeypatch.setattr("tests.common.problems.packed", lambda t, layout: poison(t))
        for t in leaves.values():
            t.grad = None
        generator = torch.Generator().manual_seed(1)
        values = problem.ours(leaves, case, layout, impl)
        cotangents = [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v) for v in values]
        torch.autograd.backward(values, cotangents)
        monkeypatch.undo()
        torch.testing.assert_close(tuple(v.detach() for v in values), expected)
        torch.testing.assert_close({k: leaves[k].grad for k in grads}, grads)
        live = int(layout.group_offsets[-1])
        assert seen and all(torch.equal(t.grad[live:], torch.zeros_like(t.grad[live:])) for t in seen)


# ---------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    case, problem = CASES["mixed_kinds"], PROBLEMS[name]
    for impl in taken(name, dtype):
        leaves = problem.leaves(case, dtype)
        values, grads = problem.run(problem.ours, leaves, case, case.layout(), impl)
        assert all(v.dtype == dtype for v in values)
        assert all(g.dtype == dtype for g in grads.values())


@pytest.mark.parametrize("name", ["routed_linear-epilogue", "routed_ffn-full", "routed_norm-layer_residual"])
def test_autocast_keeps_the_residual_stream(name: str) -> None:
    """fp32 leaves under bf16 autocast: the output has the residual's dtype, as in eager torch."""
    case, problem = CASES["mixed_kinds"], PROBLEMS[name]
    for impl in taken(name, torch.bfloat16):
        leaves = problem.leaves(case, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            values = problem.ours(leaves, case, case.layout(), impl)
        assert all(v.dtype == torch.float32 for v in values)
        torch.autograd.backward(values, [torch.ones_like(v) for v in values])
        assert all(t.grad.dtype == torch.float32 for t in leaves.values() if t.requires_grad)


@pytest.mark.parametrize("name", PROBLEMS)
def test_autocast_changes_nothing_of_16_bit_operands(name: str) -> None:
    """Inside an op fp32 stays fp32: autocast would cast the operands of its products back to 16 bits."""
    case, problem = CASES["mixed_kinds"], PROBLEMS[name]
    for impl in taken(name, torch.bfloat16):
        leaves, found = problem.leaves(case, torch.bfloat16), []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                values, grads = problem.run(problem.ours, leaves, case, case.layout(), impl)
            found.append([*values, *(grads[leaf] for leaf in sorted(grads))])
        for plain, inside in zip(*found, strict=True):
            assert plain.dtype == inside.dtype and torch.equal(plain, inside), impl


def test_autocast_without_residual_gives_the_compute_dtype() -> None:
    layout = CASES["odd"].layout()
    x = torch.randn(layout.tokens, 8)
    w = [torch.randn(6, 8)] * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert vk.routed_linear(x, w, None, layout).dtype == torch.bfloat16
        assert vk.routed_ffn(x, w, None, [torch.randn(8, 6)] * 2, None, layout).dtype == torch.bfloat16
        assert vk.shared_attention(*[x.view(-1, 2, 4)] * 3, layout).dtype == torch.bfloat16


def test_mixed_dtypes_without_autocast() -> None:
    """bf16 network on an fp32 residual stream with fp32 LayerScale."""
    case = CASES["mixed_kinds"]
    layout = case.layout()
    for impl in IMPLS:
        leaves: Leaves = {}
        for name, t in PROBLEMS["routed_linear-epilogue"].leaves(case, torch.bfloat16).items():
            wide = name in ("residual", "row_scale") or name.startswith("gamma")
            leaves[name] = t.detach().to(torch.float32 if wide else t.dtype).requires_grad_(t.requires_grad)
        y = vk.routed_linear(
            packed(leaves["x"], layout), many(leaves, "w"), many(leaves, "b"), layout, EXPERTS, impl=impl,
            gamma=many(leaves, "gamma"), residual=packed(leaves["residual"], layout),
            row_scale=packed(leaves["row_scale"], layout),
        )  # fmt: skip
        assert y.dtype == torch.float32
        y.sum().backward()
        assert all(t.grad.dtype == t.dtype for t in leaves.values() if t.requires_grad)


# ---------------------------------------------------------------------------- explain


@pytest.mark.parametrize("name", VARIANTS)
def test_explain_computes_nothing_and_tells_why(name: str) -> None:
    layout = vk.ModalityLayout.from_lengths({"text": 3, "image": 4})
    w = [torch.randn(8, 8)] * 2
    arguments = {
        "routed_linear": (torch.randn(7, 8), w, None, layout),
        "routed_norm": (torch.randn(7, 8), [torch.randn(8)] * 2, None, layout),
        "routed_ffn": (torch.randn(7, 8), w, None, w, None, layout),
        "shared_attention": (torch.randn(7, 3, 2, 4), None, None, layout),
    }
    op = PROBLEMS[name].op
    found = vk.explain(op, *arguments[op])
    assert found.chosen in IMPLS and "CUDA" in found.rejected["triton"]
    assert str(found).startswith(f"{op}: {found.chosen}\n  not triton: ")
    asked = vk.explain(op, *arguments[op], impl="reference")
    assert asked.chosen == "reference" and asked.rejected["cpu"] == "another was asked for"


def test_explain_of_a_block_names_every_part() -> None:
    layout = vk.ModalityLayout.from_lengths({"text": 3, "image": 4})
    square, vector = [torch.randn(8, 8)], [torch.randn(8)]
    params = vk.MoMEBlockParams(
        heads=2, norm1=(vector, vector), qkv=([torch.randn(24, 8)], [None]), proj=(square, [None]),
        norm2=(vector, vector), w1=square, b1=vector, w2=square, b2=vector,
    )  # fmt: skip
    x = torch.randn(7, 8)
    found = vk.explain("mome_block", x, params, layout, bias=torch.zeros(2, 7, 7))
    ops = ["routed_norm", "routed_linear", "shared_attention", "routed_linear", "routed_norm", "routed_ffn"]
    assert [part.op for part in found.parts] == ops and found.chosen == "cpu"
    half = dataclasses.replace(params, norm_kind="rms", norm1=([None], [None]), norm2=([None], [None]))
    assert vk.explain("mome_block", x, half, layout, impl="reference").chosen == "reference"
    assert "    not triton: " in str(found)


def test_explain_of_a_block_asks_for_its_layerscale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches differ with it, so the calls that `explain` asks about must carry what the block passes on."""
    block = importlib.import_module("vlmo_kernels.ops.mome_block")
    layout = vk.ModalityLayout.from_lengths({"text": 3, "image": 4})
    square, vector = [torch.randn(8, 8)], [torch.randn(8)]
    params = vk.MoMEBlockParams(
        heads=2, norm1=(vector, vector), qkv=([torch.randn(24, 8)], [None]), proj=(square, [None]),
        norm2=(vector, vector), w1=square, b1=vector, w2=square, b2=vector, gamma1=vector, gamma2=vector,
    )  # fmt: skip
    x, made = torch.randn(7, 8), []
    for name in ("routed_linear", "routed_ffn"):
        op = getattr(block, name)
        monkeypatch.setattr(block, name, lambda *a, op=op, **k: (made.append(k), op(*a, **k))[1])
    vk.mome_block(x, params, layout)
    given = inspect.signature(vk.mome_block).bind(x, params, layout)
    given.apply_defaults()
    asked = [k for name, _, k in block.calls(given.arguments) if name in ("routed_linear", "routed_ffn")]
    assert [set(k) for k in asked] == [set(k) for k in made]
    assert asked[1]["gamma"] == asked[2]["gamma"] == vector


def test_explain_and_select_say_what_is_wrong() -> None:
    layout = vk.ModalityLayout.from_lengths({"text": 3})
    x, w = torch.randn(3, 8), [torch.randn(8, 8)]
    with pytest.raises(ValueError, match="explain: `op` must be one of .*routed_ffn.*, got 'ffn'"):
        vk.explain("ffn", x)
    with pytest.raises(ValueError, match="`impl` must be one of auto, triton, cpu, reference, got 'fast'"):
        vk.routed_linear(x, w, None, layout, impl="fast")
    with pytest.raises(RuntimeError, match=r"impl='triton' on cpu .*needs a CUDA device.*Hint: impl='reference'"):
        vk.routed_linear(x, w, None, layout, impl="triton")
