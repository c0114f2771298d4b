"""`routed_linear` kernels in the interpreter, held to eager's error, with poison in dead rows and red zones."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.common.launches import record_launches
from tests.common.numerics import assert_close_as_eager
from tests.common.red_zone import red_zones
from vlmo_kernels.kernels import routed_linear
from vlmo_kernels.reference import routed_linear as reference
from vlmo_kernels.runtime.route import Route

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# (group sizes, dead rows, segments): what a batch and a model can look like; tiles are 32 rows here
ROUTES = {
    "three experts": ((40, 33, 7, 31), 0, ((0, 1, 0), (1, 3, 2), (3, 4, 1))),
    "empty expert": ((64, 0, 9), 0, ((0, 1, 0), (1, 2, 1), (2, 3, 2))),
    "dead rows": ((37, 30), 41, ((0, 1, 0), (1, 2, 1))),
    "expert twice": ((33, 80, 20), 2, ((0, 1, 1), (1, 2, 0), (2, 3, 1))),
    "one token": ((1,), 0, ((0, 1, 0),)),
    "unused expert": ((70,), 1, ((0, 1, 1),)),
    "nothing live": ((0, 0), 5, ((0, 1, 0), (1, 2, 1))),
    "split rows": ((700, 3), 1, ((0, 1, 0), (1, 2, 2))),
}
EXPERTS = 3


class Case:
    """Inputs and the upstream gradient of one call; dead rows hold NaN. Weights give outputs of order 1."""

    def __init__(self, route: str, k: int, n: int, dtype, full=False, residual=None):
        sizes, dead, segments = ROUTES[route]
        offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
        self.live, self.rows, self.dtype = sum(sizes), sum(sizes) + dead, dtype
        self.route = Route(offsets, None, segments)
        out_dtype = dtype if residual is None else residual
        self.x, self.dy = self._poisoned(k, dtype), self._poisoned(n, out_dtype)
        self.residual = None if residual is None else self._poisoned(n, residual)
        self.row_scale = None
        if full:  # DropPath: some rows are dropped
            self.row_scale = (torch.rand(self.rows) > 0.25).float() / 0.75
            self.row_scale[self.live :] = torch.nan
        self.weights = [(torch.randn(n, k) / k**0.5).to(dtype) for _ in range(EXPERTS)]
        # the second expert has no bias and the third no gamma, as in a model that mixes them
        self.biases = [torch.randn(n).to(dtype), None, torch.randn(n).to(dtype)]
        gamma_dtype = torch.float32 if residual == torch.float32 else dtype
        self.gammas = [(1 + 0.3 * torch.randn(n)).to(gamma_dtype) if full and e < 2 else None for e in range(EXPERTS)]

    def _poisoned(self, columns: int, dtype) -> torch.Tensor:
        t = torch.randn(self.rows, columns).to(dtype)
        t[self.live :] = torch.nan
        return t

    def forward(self, implementation, wide: bool = False) -> torch.Tensor:
        t = _converted(wide)
        return implementation.forward(
            t(self.x), t(self.weights), t(self.biases), t(self.gammas), self.route, t(self.residual),
            t(self.row_scale),
        )[: self.live]  # fmt: skip

    def backward(self, implementation, wide: bool = False, need=(True,) * EXPERTS):
        """Gradients by name; in a wide run upstream gradients and row scales are fp64 too."""
        t = _converted(wide)
        need = list(need)
        dx, *grads = implementation.backward(
            t(self.dy), t(self.x), t(self.weights), t(self.biases), t(self.gammas), self.route, t(self.row_scale),
            True, need, need, need,
        )  # fmt: skip
        names = ("dw", "db", "dgamma")
        return {"dx": dx} | {f"{name}{e}": g for name, gs in zip(names, grads) for e, g in enumerate(gs)}


def _converted(wide: bool):
    def convert(value):
        if isinstance(value, list):
            return [convert(v) for v in value]
        return value.double() if wide and value is not None else value

    return convert


def eager(case: Case, x, weights, biases, gammas) -> torch.Tensor:
    """What a user writes: a linear on each expert's rows, then one op a step, then a cat."""
    parts = []
    for start, end, e in case.route.ranges():
        y = torch.nn.functional.linear(x[start:end], weights[e], biases[e])
        if gammas[e] is not None:
            y = y * gammas[e]
        if case.row_scale is not None:
            y = y * case.row_scale[start:end, None].to(y.dtype)
        parts.append(y if case.residual is None else y + case.residual[start:end])
    out_dtype = x.dtype if case.residual is None else case.residual.dtype
    return torch.cat(parts).to(out_dtype) if parts else x.new_zeros(0, weights[0].shape[0], dtype=out_dtype)


def eager_backward(case: Case) -> dict[str, torch.Tensor | None]:
    """The same gradients by autograd over torch's own ops."""
    x = case.x[: case.live].clone().requires_grad_()
    leaves = [
        [None if t is None else t.clone().requires_grad_() for t in ts]
        for ts in (case.weights, case.biases, case.gammas)
    ]
    if case.live:
        eager(case, x, *leaves).backward(case.dy[: case.live])

    def grad(leaf):
        return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    return {"dx": grad(x)} | {
        f"{name}{e}": None if t is None else grad(t)
        for name, ts in zip(("dw", "db", "dgamma"), leaves)
        for e, t in enumerate(ts)
    }


def compare(case: Case) -> None:
    with red_zones():
        y = case.forward(routed_linear)
        grads = case.backward(routed_linear)
    plain = eager(case, case.x[: case.live], case.weights, case.biases, case.gammas)
    assert_close_as_eager(y, case.forward(reference, wide=True), plain, "y")
    exact, plain = case.backward(reference, wide=True), eager_backward(case)
    assert (grads["dx"][case.live :] == 0).all()  # and so not NaN
    grads["dx"], exact["dx"] = grads["dx"][: case.live], exact["dx"][: case.live]
    for name, grad in grads.items():
        assert (grad is None) == (exact[name] is None), name
        if grad is not None:
            assert grad.is_contiguous()
            assert_close_as_eager(grad, exact[name], plain[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_routes(route: str, dtype: torch.dtype) -> None:
    compare(Case(route, 40, 37, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ["three experts", "expert twice", "split rows"])
def test_whole_epilogue(route: str, dtype: torch.dtype) -> None:
    compare(Case(route, 34, 50, dtype, full=True))  # no residual, which would hide the errors of the rest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual(dtype: torch.dtype) -> None:
    compare(Case("dead rows", 34, 50, dtype, full=True, residual=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_residual_and_gamma_in_fp32(dtype: torch.dtype) -> None:
    """Under autocast the stream and LayerScale are fp32, the weights are not."""
    case = Case("dead rows", 34, 50, dtype, full=True, residual=torch.float32)
    y, grads = case.forward(routed_linear), case.backward(routed_linear)
    assert y.dtype == grads["dgamma0"].dtype == torch.float32
    assert grads["dx"].dtype == grads["dw0"].dtype == dtype
    compare(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k, n", [(16, 64), (17, 8), (65, 33), (1, 40)])
def test_widths(k: int, n: int, dtype: torch.dtype) -> None:
    """Whole tiles, a part of one, and one column more than a tile."""
    compare(Case("dead rows", k, n, dtype, full=True))


def test_frozen_experts_get_none() -> None:
    case = Case("three experts", 40, 24, torch.float32, full=True)
    everything = case.backward(routed_linear)
    some = case.backward(routed_linear, need=(False, True, False))
    for name, grad in some.items():
        if name == "dx" or name.endswith("1") and name != "db1":
            assert torch.equal(grad, everything[name])
        else:
            assert grad is None


def test_strided_rows_and_expanded_gradients() -> None:
    case = Case("dead rows", 40, 24, torch.float32, full=True, residual=torch.float32)
    wanted = {"y": case.forward(routed_linear)} | case.backward(routed_linear)
    for name in ("x", "residual", "dy"):
        t = getattr(case, name)
        wide = torch.full((t.shape[0], 64), torch.nan)
        wide[:, 11 : 11 + t.shape[1]] = t
        setattr(case, name, wide[:, 11 : 11 + t.shape[1]])
    case.weights = [w.T.contiguous().T for w in case.weights]
    actual = {"y": case.forward(routed_linear)} | case.backward(routed_linear)
    for name, t in wanted.items():
        assert t is None if actual[name] is None else torch.equal(actual[name], t)
    case.dy = torch.ones(()).expand(case.rows, 24)
    expanded = case.backward(routed_linear)["dx"]
    case.dy = torch.ones(case.rows, 24)
    assert torch.equal(expanded, case.backward(routed_linear)["dx"])


def test_arguments_are_left_alone() -> None:
    case = Case("dead rows", 40, 24, torch.bfloat16, full=True, residual=torch.float32)
    tensors = [case.x, case.dy, case.residual, case.row_scale, *case.weights, *case.gammas[:2], case.biases[0]]
    before = [t.clone() for t in tensors]
    case.forward(routed_linear), case.backward(routed_linear)
    for t, copy in zip(tensors, before):
        assert torch.equal(t.nan_to_num(7.0), copy.nan_to_num(7.0))


def test_no_rows_at_all() -> None:
    route = Route(torch.zeros(3, dtype=torch.int32), None, ((0, 1, 0), (1, 2, 1)))
    weights, vectors = [torch.randn(6, 8) for _ in range(2)], [torch.randn(6) for _ in range(2)]
    assert routed_linear.forward(torch.empty(0, 8), weights, vectors, vectors, route, None, None).shape == (0, 6)
    need = [True, False]
    with red_zones():
        dx, dw, db, dgamma = routed_linear.backward(
            torch.empty(0, 6), torch.empty(0, 8), weights, vectors, vectors, route, None, True, need, need, need
        )
    assert dx.shape == (0, 8)
    assert torch.equal(dw[0], torch.zeros(6, 8)) and dw[1] is None
    assert all(torch.equal(g[0], torch.zeros(6)) and g[1] is None for g in (db, dgamma))


def test_rows_of_other_experts_do_not_matter() -> None:
    """NaN in one expert's rows stays there, though its rows share tiles' loads with its neighbours."""
    case = Case("three experts", 40, 24, torch.float32)
    wanted_y, wanted = case.forward(routed_linear), case.backward(routed_linear)
    case.x[40:80] = case.dy[40:80] = torch.nan  # the third expert's
    y, grads = case.forward(routed_linear), case.backward(routed_linear)
    others = [*range(40), *range(80, 111)]
    assert torch.equal(y[others], wanted_y[others]) and y[40:80].isnan().all()
    assert torch.equal(grads["dx"][others], wanted["dx"][others])
    assert all(torch.equal(grads[name], wanted[name]) for name in ("dw0", "dw1", "db0"))


def test_launch_depends_on_capacity_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of one capacity: the same grids, constants and integers, as a captured graph needs."""
    launches = record_launches(monkeypatch)
    seen = []
    for offsets in ([0, 3, 90], [0, 80, 80]):
        case = Case("dead rows", 40, 24, torch.float32, full=True)
        case.route = Route(torch.tensor(offsets, dtype=torch.int32), None, case.route.segments)
        case.x, case.dy, case.live = torch.randn(108, 40), torch.randn(108, 24), offsets[-1]
        case.forward(routed_linear), case.backward(routed_linear)
        seen.append(launches.copy())
        launches.clear()
    assert len(seen[0]) == 6 and seen[0] == seen[1]
