"""The rule of tests/common/numerics.py bites: wrong code fails it, in results and in gradients.

Mutants are wrong in the way bugs are. Each is fed to the check that judges the implementations, with gammas of
order 1 and no residual. All are caught in fp32, and in bf16 all but one: tanh GELU for erf GELU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import vlmo_kernels as vk
from tests.common import eager
from tests.common.agreement import compared
from tests.common.cases import CASES, Case
from tests.common.numerics import assert_close_as_eager
from tests.common.problems import EPS, PROBLEMS, Leaves, Outputs, many

BATCH = (CASES["mixed_kinds"],)
Mutant = Callable[[Leaves, Case, vk.ModalityLayout, str], Outputs]


def leaves_changed(name: str, change: Callable[[Leaves], Leaves]) -> Mutant:
    """The op itself on changed leaves; gradients flow back through the change, wrong with it."""

    def mutant(leaves: Leaves, *rest) -> Outputs:
        return PROBLEMS[name].ours({**leaves, **change(leaves)}, *rest)

    return mutant


def swapped(*names: str) -> Callable[[Leaves], Leaves]:
    """Experts 0 and 1 exchanged."""
    return lambda t: {f"{n}.{e}": t[f"{n}.{1 - e}"] for n in names for e in (0, 1)}


def missing(leaf: str) -> Callable[[Leaves], Leaves]:
    return lambda t: {leaf: t[leaf] * 0}


def transposed(leaf: str, side: int) -> Callable[[Leaves], Leaves]:
    """The square corner of a weight read with its strides exchanged."""

    def change(t: Leaves) -> Leaves:
        w = t[leaf]
        corner = torch.cat([w[:side, :side].T, w[:side, side:]], 1)
        return {leaf: torch.cat([corner, w[side:]])}

    return change


def scaled(name: str, factor: float) -> Mutant:
    return lambda *a: tuple(y * factor for y in PROBLEMS[name].ours(*a))


def dropped(name: str) -> Mutant:
    """The last columns of a row's result are left at zero: a tile too few."""

    def mutant(*a) -> Outputs:
        return tuple(torch.cat([y[..., :-8], y[..., -8:] * 0], -1) for y in PROBLEMS[name].ours(*a))

    return mutant


def activation(name: str, kind: str) -> Mutant:
    def mutant(t: Leaves, case: Case, layout: vk.ModalityLayout, impl: str) -> Outputs:
        y = eager.routed_ffn(
            t["x"], case.expert_ids(), many(t, "w1"), many(t, "b1"), many(t, "w2"), many(t, "b2"), kind,
            w_up=many(t, "w_up") if "w_up.0" in t else None, gammas=many(t, "gamma"),
        )  # fmt: skip
        return (y,)

    return mutant


def norm_kind(kind: str) -> Mutant:
    def mutant(t: Leaves, case: Case, layout: vk.ModalityLayout, impl: str) -> Outputs:
        return eager.routed_norm(t["x"], case.expert_ids(), many(t, "w"), many(t, "b"), kind, EPS)

    return mutant


def attends(causal: bool = False, scale: float | None = None) -> Mutant:
    def mutant(t: Leaves, case: Case, layout: vk.ModalityLayout, impl: str) -> Outputs:
        return (eager.shared_attention(t["q"], t["k"], t["v"], case.ids() >= 0, causal=causal, scale=scale),)

    return mutant


def sees_padding(t: Leaves, case: Case, layout: vk.ModalityLayout, impl: str) -> Outputs:
    o = eager.shared_attention(t["q"], t["k"], t["v"], torch.ones_like(case.ids()).bool())
    return (torch.where((case.ids() >= 0)[..., None, None], o, 0.0),)


def common_mutants(name: str) -> dict[str, Mutant]:
    return {"x1.01": scaled(name, 1.01), "dropped tile": dropped(name)}


LINEAR, NORM, FFN, GATED = "routed_linear-plain", "routed_norm-layer", "routed_ffn-gelu", "routed_ffn-swiglu"
ATTENTION, BIAS = "shared_attention-plain", "shared_attention-bias"
MUTANTS: dict[str, dict[str, Mutant]] = {
    LINEAR: common_mutants(LINEAR)
    | {
        "swapped experts": leaves_changed(LINEAR, swapped("w")),
        "missing bias": leaves_changed(LINEAR, missing("b.0")),
        "transposed weight": leaves_changed(LINEAR, transposed("w.0", 24)),
    },
    NORM: common_mutants(NORM)
    | {
        "swapped experts": leaves_changed(NORM, swapped("w")),
        "missing bias": leaves_changed(NORM, missing("b.0")),
        "no mean": norm_kind("rms"),
        "1 + w": norm_kind("rms1p"),
    },
    FFN: common_mutants(FFN)
    | {
        "swapped experts": leaves_changed(FFN, swapped("w1", "b1", "w2")),
        "missing bias": leaves_changed(FFN, missing("b1.0")),
        "transposed weight": leaves_changed(FFN, transposed("w2.0", 40)),
        "gamma forgotten": leaves_changed(FFN, lambda t: {f"gamma.{e}": t[f"gamma.{e}"] ** 0 for e in range(3)}),
        "relu": activation(FFN, "relu"),
        "silu": activation(FFN, "silu"),
        "tanh for erf": activation(FFN, "gelu_tanh"),
    },
    GATED: common_mutants(GATED)
    | {
        "gate and up swapped": leaves_changed(
            GATED, lambda t: {f"{a}.{e}": t[f"{b}.{e}"] for a, b in (("w1", "w_up"), ("w_up", "w1")) for e in range(3)}
        ),
        "geglu": activation(GATED, "geglu"),
    },
    ATTENTION: common_mutants(ATTENTION)
    | {
        "causal": attends(causal=True),
        "no scale": attends(scale=1.0),
        "padding seen": sees_padding,
        "keys for values": leaves_changed(ATTENTION, lambda t: {"v": t["k"] + 0 * t["v"]}),
    },
    BIAS: common_mutants(BIAS)
    | {
        "missing bias": leaves_changed(BIAS, missing("table")),
        "bias transposed": leaves_changed(BIAS, lambda t: {"table": t["table"].flip(0)}),
    },
}  # fmt: skip
ALL = [(name, mutant) for name, mutants in MUTANTS.items() for mutant in mutants]
# In 16 bits the rounding of the result is larger than the difference of the two GELUs.
UNSEEN = {torch.float32: set(), torch.bfloat16: {(FFN, "tanh for erf")}}


def caught(name: str, dtype: torch.dtype, mutant: Mutant | None) -> list[str]:
    """Names of the results and gradients that the rule rejects."""
    rejected = []
    for what, three in compared(PROBLEMS[name], BATCH, dtype, mutant, "reference", False, 3).items():
        try:
            assert_close_as_eager(*three, what)
        except AssertionError:
            rejected.append(what)
    return rejected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MUTANTS)
def test_the_right_code_passes(name: str, dtype: torch.dtype) -> None:
    assert caught(name, dtype, None) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "mutant"), ALL)
def test_a_mutant_is_caught(name: str, mutant: str, dtype: torch.dtype) -> None:
    found = caught(name, dtype, MUTANTS[name][mutant])
    assert ("output 0" in found) == ((name, mutant) not in UNSEEN[dtype]), found


class WrongGradient(torch.autograd.Function):
    """The identity with a wrong derivative."""

    @staticmethod
    def forward(ctx, t: torch.Tensor, kind: str) -> torch.Tensor:
        ctx.kind = kind
        return t.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        if ctx.kind == "x1.01":
            return grad * 1.01, None
        if ctx.kind == "forgotten":
            return torch.zeros_like(grad), None
        cut = grad.clone()
        cut[..., -4:] = 0
        return cut, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["x1.01", "forgotten", "dropped tile"])
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_gradient_is_caught(name: str, kind: str, dtype: torch.dtype) -> None:
    """Every gradient of every op, one kind of wrong at a time: all rejected, all results right."""

    def mutant(leaves: Leaves, *rest) -> Outputs:
        return PROBLEMS[name].ours(
            {n: WrongGradient.apply(t, kind) if t.requires_grad else t for n, t in leaves.items()}, *rest
        )

    found = caught(name, dtype, mutant)
    gradients = {f"gradient of {leaf.partition('.')[0]}" for leaf in PROBLEMS[name].shapes}
    assert set(found) == gradients, f"passed: {sorted(gradients - set(found))}"


def test_small_gammas_hide_what_the_suite_must_see() -> None:
    """Why gammas are of order 1 and residuals absent: with 0.1 and a residual, bf16 lets x1.01 through."""

    def check(gamma: float, residual: float) -> bool:
        generator = torch.Generator().manual_seed(0)
        branch = torch.randn(64, 48, generator=generator, dtype=torch.float64)
        x = residual * torch.randn(64, 48, generator=generator, dtype=torch.float64)
        b, r = branch.bfloat16(), x.bfloat16()
        expected = r.double() + gamma * b.double()
        wrong = (r.double() + gamma * 1.01 * b.double()).bfloat16()
        try:
            assert_close_as_eager(wrong, expected, r + gamma * b)
        except AssertionError:
            return True
        return False

    assert check(gamma=1.0, residual=0.0) and not check(gamma=0.1, residual=1.0)
