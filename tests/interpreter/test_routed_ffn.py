"""`routed_ffn` kernels in the interpreter, held to eager's error, with poison in dead rows and red zones."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.common.numerics import assert_close_as_eager
from tests.common.red_zone import red_zones
from vlmo_kernels.kernels import routed_ffn
from vlmo_kernels.reference import routed_ffn as reference
from vlmo_kernels.runtime.ffn_weights import FFNWeights
from vlmo_kernels.runtime.route import Route

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PLAIN = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
GATED = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": PLAIN["gelu_tanh"]}
EPS = 1e-5
EXPERTS = 3

# (group sizes, dead rows, segments); tiles are 32 rows here
ROUTES = {
    "three experts": ((40, 33, 7, 31), 0, ((0, 1, 0), (1, 3, 2), (3, 4, 1))),
    "empty expert": ((64, 0, 9), 0, ((0, 1, 0), (1, 2, 1), (2, 3, 2))),
    "dead rows": ((37, 30), 41, ((0, 1, 0), (1, 2, 1))),
    "expert twice": ((33, 80, 20), 2, ((0, 1, 1), (1, 2, 0), (2, 3, 1))),
    "one token": ((1,), 0, ((0, 1, 0),)),
    "nothing live": ((0, 0), 5, ((0, 1, 0), (1, 2, 1))),
}


class Case:
    """Inputs and the upstream gradient of one call; dead rows hold NaN."""

    def __init__(
        self, route: str, dtype, activation="gelu", d=34, f=50, gamma=False, drop=False, residual=None, norm=False
    ):
        sizes, dead, segments = ROUTES[route]
        self.live, self.rows, self.activation = sum(sizes), sum(sizes) + dead, activation
        self.route = Route(torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32), None, segments)
        self.x, self.dy = self._poisoned(d, dtype), self._poisoned(d, residual or dtype)
        self.residual = None if residual is None else self._poisoned(d, residual)
        self.row_scale = None
        if drop:
            self.row_scale = (torch.rand(self.rows) > 0.25).float() / 0.75
            self.row_scale[self.live :] = torch.nan

        def each(*shape, here=True, scale=1.0, shift=0.0, skip=None):
            return [
                (shift + scale * torch.randn(*shape)).to(dtype) if here and e != skip else None for e in range(EXPERTS)
            ]

        gated = activation in GATED
        self.weights = FFNWeights(
            w1=each(f, d, scale=d**-0.5),
            b1=each(f, skip=1),
            w2=each(d, f, scale=f**-0.5),
            b2=each(d, skip=0),
            w_up=each(f, d, scale=d**-0.5, here=gated),
            b_up=each(f, here=gated, skip=2),
            gamma=each(d, here=gamma, scale=0.3, shift=1.0, skip=2),
            norm_weight=each(f, here=norm, scale=0.3, shift=1.0),
            norm_bias=each(f, here=norm, skip=1),
        )
        if residual == torch.float32 and gamma:
            self.weights = self.weights._replace(gamma=[g if g is None else g.float() for g in self.weights.gamma])
        self.need = FFNWeights(*([t is not None for t in ts] for ts in self.weights))

    def _poisoned(self, columns: int, dtype) -> torch.Tensor:
        t = torch.randn(self.rows, columns).to(dtype)
        t[self.live :] = torch.nan
        return t

    def forward(self, implementation, wide: bool = False, save: bool = True) -> dict[str, torch.Tensor]:
        t = _converted(wide)
        out = implementation.forward(
            t(self.x), t(self.weights), self.route, self.activation, t(self.residual), t(self.row_scale), EPS, save
        )
        return {n: o[: self.live] for n, o in zip(("y", "pre", "up"), out, strict=True) if o is not None}

    def backward(self, implementation, wide: bool = False, recompute: bool = True, need=None, need_dx: bool = True):
        """Gradients by name. Saved pre-activations are the implementation's own."""
        t = _converted(wide)
        x, weights = t(self.x), t(self.weights)
        pre = up = None
        if not recompute:
            _, pre, up = implementation.forward(
                x, weights, self.route, self.activation, None, t(self.row_scale), EPS, True
            )
        dx, grads = implementation.backward(
            t(self.dy), x, weights, pre, up, self.route, self.activation, t(self.row_scale), EPS, need_dx,
            need or self.need,
        )  # fmt: skip
        return {"dx": dx} | {f"d{name}{e}": g for name, gs in zip(FFNWeights._fields, grads) for e, g in enumerate(gs)}


def _converted(wide: bool):
    def convert(value):
        if isinstance(value, FFNWeights):
            return FFNWeights(*(convert(v) for v in value))
        if isinstance(value, list):
            return [convert(v) for v in value]
        return value.double() if wide and value is not None else value

    return convert


def eager(case: Case, x: torch.Tensor, weights: FFNWeights) -> dict[str, torch.Tensor]:
    """What a user writes: torch's own ops on each expert's rows, one op a step, then a cat."""
    outs: dict[str, list[torch.Tensor]] = {"y": [], "pre": [], "up": []}
    for start, end, e in case.route.ranges():
        w = weights.expert(e)
        z = F.linear(x[start:end], w.w1, w.b1)
        outs["pre"].append(z)
        if case.activation in GATED:
            u = F.linear(x[start:end], w.w_up, w.b_up)
            outs["up"].append(u)
            h = GATED[case.activation](z) * u
        else:
            h = PLAIN[case.activation](z)
        if w.norm_weight is not None:
            h = F.layer_norm(h, h.shape[1:], w.norm_weight, w.norm_bias, EPS)
        y = F.linear(h, w.w2, w.b2)
        if w.gamma is not None:
            y = y * w.gamma
        if case.row_scale is not None:
            y = y * case.row_scale[start:end, None].to(y.dtype)
        outs["y"].append(y if case.residual is None else y + case.residual[start:end])
    return {name: torch.cat(ts) for name, ts in outs.items() if ts}


def eager_backward(case: Case) -> dict[str, torch.Tensor | None]:
    x = case.x[: case.live].clone().requires_grad_()
    leaves = FFNWeights(*([None if t is None else t.clone().requires_grad_() for t in ts] for ts in case.weights))
    if case.live:
        eager(case, x, leaves)["y"].backward(case.dy[: case.live])

    def grad(leaf):
        return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    return {"dx": grad(x)} | {
        f"d{name}{e}": None if t is None else grad(t)
        for name, ts in zip(FFNWeights._fields, leaves)
        for e, t in enumerate(ts)
    }


def compare(case: Case, recompute: bool = False) -> None:
    with red_zones():
        actual = case.forward(routed_ffn)
        grads = case.backward(routed_ffn, recompute=recompute)
    exact, plain = case.forward(reference, wide=True), eager(case, case.x[: case.live], case.weights)
    assert actual.keys() == exact.keys()
    for name, t in actual.items():
        if case.live:
            assert_close_as_eager(t, exact[name], plain[name], f"{name} {case.activation}")
    exact, plain = case.backward(reference, wide=True), eager_backward(case)
    assert (grads["dx"][case.live :] == 0).all()  # and so not NaN
    grads["dx"], exact["dx"] = grads["dx"][: case.live], exact["dx"][: case.live]
    for name, grad in grads.items():
        assert (grad is None) == (exact[name] is None), name
        assert grad is None or grad.is_contiguous()
    for field in ("dx", *(f"d{name}" for name in FFNWeights._fields)):
        # The experts together: one expert's bias alone is few values for a rule of averages.
        names = [n for n in grads if n in (field, *(f"{field}{e}" for e in range(EXPERTS))) and grads[n] is not None]
        assert names or not any(getattr(case.need, field[1:], (True,))), field
        if names:
            together = [torch.cat([g[n].flatten() for n in names]) for g in (grads, exact, plain)]
            assert_close_as_eager(*together, f"{field} {case.activation}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [*PLAIN, *GATED])
def test_activations(activation: str, dtype: torch.dtype) -> None:
    compare(Case("three experts", dtype, activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "route, activation", [*((route, "gelu") for route in ROUTES), ("expert twice", "swiglu"), ("dead rows", "swiglu")]
)
def test_routes_with_layer_scale_and_drop_path(route: str, activation: str, dtype: torch.dtype) -> None:
    compare(Case(route, dtype, activation, gamma=True, drop=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "route, activation", [("three experts", "geglu_tanh"), ("dead rows", "gelu"), ("nothing live", "gelu")]
)
def test_inner_norm(route: str, activation: str, dtype: torch.dtype) -> None:
    compare(Case(route, dtype, activation, gamma=True, drop=True, norm=True))


def test_inner_norm_of_many_columns() -> None:
    compare(Case("one token", torch.float32, d=8, f=1100, norm=True))  # blocks of 1024 columns


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recomputed_pre_activation(dtype: torch.dtype) -> None:
    for activation in ("gelu", "swiglu"):
        case = Case("dead rows", dtype, activation, gamma=True)
        compare(case, recompute=True)
        saved, again = (case.backward(routed_ffn, recompute=flag) for flag in (False, True))
        assert all(torch.equal(g, again[n]) for n, g in saved.items() if g is not None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual(dtype: torch.dtype) -> None:
    compare(Case("dead rows", dtype, gamma=True, drop=True, residual=dtype))
    if dtype != torch.float32:  # autocast: stream and LayerScale in fp32
        case = Case("dead rows", dtype, gamma=True, drop=True, residual=torch.float32)
        assert case.forward(routed_ffn)["y"].dtype == torch.float32
        compare(case)


@pytest.mark.parametrize("d, f", [(16, 64), (17, 8), (65, 33)])
def test_widths(d: int, f: int) -> None:
    for activation in ("gelu", "geglu"):
        compare(Case("dead rows", torch.float32, activation, d=d, f=f, gamma=True))


@pytest.mark.parametrize("norm", [False, True])
def test_only_what_is_needed(norm: bool) -> None:
    """Every single gradient alone is the same as among all the others; a frozen expert gets None."""
    case = Case("dead rows", torch.float32, "swiglu", gamma=True, drop=True, norm=norm)
    everything = case.backward(routed_ffn)
    nothing = FFNWeights(*([False] * EXPERTS for _ in FFNWeights._fields))
    for name in FFNWeights._fields:
        if not any(getattr(case.need, name)):
            continue
        e = getattr(case.need, name).index(True)
        need = nothing._replace(**{name: [i == e for i in range(EXPERTS)]})
        alone = case.backward(routed_ffn, need=need, need_dx=False)
        assert torch.equal(alone.pop(f"d{name}{e}"), everything[f"d{name}{e}"]), name
        assert all(g is None for g in alone.values())
    only_dx = case.backward(routed_ffn, need=nothing)
    assert torch.equal(only_dx.pop("dx"), everything["dx"])
    assert all(g is None for g in only_dx.values())


def test_strided_rows() -> None:
    case = Case("dead rows", torch.float32, gamma=True, residual=torch.float32)
    wanted = case.forward(routed_ffn) | case.backward(routed_ffn)
    for name in ("x", "residual", "dy"):
        t = getattr(case, name)
        wide = torch.full((t.shape[0], 64), torch.nan)
        wide[:, 11:45] = t
        setattr(case, name, wide[:, 11:45])
    actual = case.forward(routed_ffn) | case.backward(routed_ffn)
    for name, t in wanted.items():
        assert t is None if actual[name] is None else torch.equal(actual[name], t)


def test_without_saving_nothing_is_saved() -> None:
    case = Case("three experts", torch.float32, "swiglu")
    assert case.forward(routed_ffn, save=False).keys() == {"y"}
    assert torch.equal(case.forward(routed_ffn, save=False)["y"], case.forward(routed_ffn)["y"])


def test_no_rows_at_all() -> None:
    case = Case("one token", torch.float32, "swiglu", gamma=True, norm=True)
    case.route = Route(torch.zeros(2, dtype=torch.int32), None, ((0, 1, 0),))
    case.x, case.dy, case.live = case.x[:0], case.dy[:0], 0
    assert case.forward(routed_ffn)["y"].shape == (0, 34)
    with red_zones():
        grads = case.backward(routed_ffn)
    assert grads.pop("dx").shape == (0, 34)
    assert all((g == 0).all() for g in grads.values() if g is not None)


def test_exact_and_tanh_gelu_differ_in_fp32() -> None:
    """The rule would see one GELU in the place of the other."""
    case = Case("three experts", torch.float32, "gelu")
    exact, plain = case.forward(reference, wide=True)["y"], eager(case, case.x, case.weights)["y"]
    case.activation = "gelu_tanh"
    with pytest.raises(AssertionError, match="further from fp64"):
        assert_close_as_eager(case.forward(routed_ffn)["y"], exact, plain)
