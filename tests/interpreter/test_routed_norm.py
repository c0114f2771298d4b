"""`routed_norm` kernels in the interpreter, held to eager's error, with poison in dead rows and red zones."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.common.launches import record_launches
from tests.common.numerics import assert_close_as_eager
from tests.common.red_zone import red_zones
from vlmo_kernels.kernels import routed_norm
from vlmo_kernels.reference import routed_norm as reference
from vlmo_kernels.runtime.route import Route

KINDS = ["layer", "rms", "rms1p"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5

# (group sizes, dead rows, segments): what a batch and a model can look like
ROUTES = {
    "three experts": ((5, 7, 3, 4), 0, ((0, 1, 0), (1, 3, 2), (3, 4, 1))),
    "empty expert": ((6, 0, 9), 0, ((0, 1, 0), (1, 2, 1), (2, 3, 2))),
    "dead rows": ((4, 3), 6, ((0, 1, 0), (1, 2, 1))),
    "expert twice": ((3, 8, 2), 2, ((0, 1, 1), (1, 2, 0), (2, 3, 1))),
    "one token": ((1,), 0, ((0, 1, 0),)),
    "unused expert": ((70,), 1, ((0, 1, 1),)),
    "nothing live": ((0, 0), 5, ((0, 1, 0), (1, 2, 1))),
}


class Case:
    """Inputs and upstream gradients of one call; dead rows hold NaN."""

    def __init__(self, route: str, columns: int, dtype, kind: str, residual=None, affine=True):
        sizes, dead, segments = ROUTES[route]
        offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
        self.live, self.kind = sum(sizes), kind
        self.route = Route(offsets, None, segments)
        self.experts = 3
        rows = self.live + dead

        def poisoned(dtype: torch.dtype) -> torch.Tensor:
            t = (2 * torch.randn(rows, columns) + 0.5).to(dtype)
            t[self.live :] = torch.nan
            return t

        self.x, self.dy = poisoned(dtype), poisoned(dtype)
        self.residual = None if residual is None else poisoned(residual)
        self.dz = None if residual is None else poisoned(residual)
        vectors = torch.randn(2, self.experts, columns).to(dtype)
        self.weights = [*vectors[0]] if affine else [None] * self.experts
        # the second expert has no bias, as in a model that mixes them
        self.biases = (
            [vectors[1][0], None, vectors[1][2]] if affine and kind == "layer" else [None] * self.experts
        )

    def forward(self, implementation, dtype=None):
        """Outputs by name, live rows only; everything in fp64 where `dtype` says so."""
        t = _converted(dtype)
        out = implementation.forward(
            t(self.x), t(self.residual), t(self.weights), t(self.biases), self.route, self.kind, EPS
        )
        return {
            name: o[: self.live]
            for name, o in zip("y z mean rstd".split(), out, strict=True)
            if o is not None
        }

    def backward(self, implementation, dtype=None, need_dw=(True,) * 3, need_db=(True,) * 3):
        """Gradients by name. The statistics are the reference's, in the same dtype."""
        t = _converted(dtype)
        x, residual, weights, biases = t(self.x), t(self.residual), t(self.weights), t(self.biases)
        _, z, mean, rstd = reference.forward(x, residual, weights, biases, self.route, self.kind, EPS)
        dx, dw, db = implementation.backward(
            t(self.dy), t(self.dz), x if z is None else z, weights, biases, mean, rstd, self.route, self.kind,
            list(need_dw), list(need_db),
        )  # fmt: skip
        return {"dx": dx} | {
            f"d{kind}{e}": g for kind, gs in (("w", dw), ("b", db)) for e, g in enumerate(gs)
        }


def _converted(dtype):
    def convert(value):
        if isinstance(value, list):
            return [convert(v) for v in value]
        return value if value is None or dtype is None else value.to(dtype)

    return convert


def eager_backward(case: Case) -> dict[str, torch.Tensor]:
    """The same gradients by autograd over torch's own ops in the dtype of the inputs."""
    x = case.x[: case.live].clone().requires_grad_()
    leaves = [
        [None if t is None else t.clone().requires_grad_() for t in ts] for ts in (case.weights, case.biases)
    ]
    residual = None if case.residual is None else case.residual[: case.live]
    y, z = eager(case, x, residual, *leaves)
    y.backward(case.dy[: case.live], retain_graph=residual is not None)
    dx = x.grad
    if residual is not None:  # d(x + residual), in the residual's dtype
        (dz,) = torch.autograd.grad(y, z, case.dy[: case.live])
        dx = dz + case.dz[: case.live]
    out = {"dx": dx}
    for kind, ts in zip("wb", leaves, strict=True):
        out |= {f"d{kind}{e}": None if t is None else _grad(t) for e, t in enumerate(ts)}
    return out


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def eager(case: Case, x, residual, weights, biases) -> tuple[torch.Tensor, torch.Tensor]:
    """What a user writes: an add, torch's norm on each expert's rows, a cat."""
    z = x if residual is None else x + residual
    parts = []
    for start, end, e in case.route.ranges():
        rows, w, b = z[start:end], weights[e], biases[e]
        if case.kind == "rms1p" and w is not None:
            w = 1 + w
        w, b = (None if t is None else t.to(rows.dtype) for t in (w, b))
        shape = rows.shape[1:]
        norm = torch.nn.functional.layer_norm if case.kind == "layer" else torch.nn.functional.rms_norm
        parts.append(norm(rows, shape, w, *([b] if case.kind == "layer" else []), eps=EPS))
    return torch.cat(parts).to(x.dtype) if parts else x * 1, z


def compare(case: Case, forward: bool = True, backward: bool = True) -> None:
    if forward:
        with red_zones():
            actual = case.forward(routed_norm)
        exact = case.forward(reference, torch.float64)
        plain = case.forward(reference)
        residual = None if case.residual is None else case.residual[: case.live]
        plain["y"] = eager(case, case.x[: case.live], residual, case.weights, case.biases)[0]
        assert actual.keys() == exact.keys()
        for name in actual:
            assert_close_as_eager(actual[name], exact[name], plain[name], f"{name} {case.kind}")
    if backward:
        with red_zones():
            actual = case.backward(routed_norm)
        exact = case.backward(reference, torch.float64)
        plain = eager_backward(case)
        assert (actual["dx"][case.live :] == 0).all()  # and so not NaN
        actual["dx"], exact["dx"] = actual["dx"][: case.live], exact["dx"][: case.live]
        for name in actual:
            if exact[name] is None:
                assert actual[name] is None
            else:
                assert_close_as_eager(actual[name], exact[name], plain[name], f"{name} {case.kind}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_routes(route: str, kind: str, dtype: torch.dtype) -> None:
    compare(Case(route, 37, dtype, kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [16, 34, 544, 768, 1408])
def test_widths(columns: int, kind: str, dtype: torch.dtype) -> None:
    compare(Case("three experts", columns, dtype, kind, residual=dtype))


@pytest.mark.parametrize(
    ("columns", "kind"), [(3000, "layer"), (8192, "rms"), (9000, "layer"), (16384, "rms1p")]
)
def test_wide_rows(columns: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed_norm, "MAX_PARTIALS", 2)  # the interpreter's time goes by programs
    compare(Case("dead rows", columns, torch.bfloat16, kind, residual=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_residual_in_fp32(kind: str, dtype: torch.dtype) -> None:
    """Under autocast the stream is fp32 and the branch is not: y has the branch's dtype, z the stream's."""
    case = Case("expert twice", 40, dtype, kind, residual=torch.float32)
    out = case.forward(routed_norm)
    assert out["y"].dtype == dtype and out["z"].dtype == torch.float32
    compare(case)


@pytest.mark.parametrize("kind", KINDS)
def test_without_affine(kind: str) -> None:
    case = Case("three experts", 40, torch.float32, kind, affine=False)
    compare(case)
    assert all(g is None for name, g in case.backward(routed_norm).items() if name != "dx")


def test_weights_in_fp32_on_16_bit_rows() -> None:
    case = Case("three experts", 40, torch.bfloat16, "layer")
    case.weights, case.biases = (
        [None if t is None else t.float() for t in ts] for ts in (case.weights, case.biases)
    )
    compare(case)
    assert case.backward(routed_norm)["dw0"].dtype == torch.float32


def test_frozen_experts_get_none() -> None:
    case = Case("three experts", 40, torch.float32, "layer")
    everything = case.backward(routed_norm)
    some = case.backward(routed_norm, need_dw=(False, True, False), need_db=(False, False, True))
    for name, grad in some.items():
        if name in ("dx", "dw1", "db2"):
            assert torch.equal(grad, everything[name])
        else:
            assert grad is None


@pytest.mark.parametrize("partials", [1, 2, 5])
def test_many_tiles_a_program(partials: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that own many tiles, cross several segments, or lie in dead rows altogether."""
    monkeypatch.setattr(routed_norm, "MAX_PARTIALS", partials)
    for route in ("three experts", "dead rows", "unused expert"):
        compare(Case(route, 600, torch.float32, "layer"), forward=False)


def test_strided_rows_and_expanded_gradients() -> None:
    case = Case("dead rows", 40, torch.float32, "layer", residual=torch.float32)
    wanted = case.forward(routed_norm), case.backward(routed_norm)
    for name in ("x", "residual", "dy", "dz"):
        t = getattr(case, name)
        wide = torch.full((t.shape[0], 64), torch.nan)
        wide[:, 11:51] = t
        setattr(case, name, wide[:, 11:51])
    for a, b in zip(wanted, (case.forward(routed_norm), case.backward(routed_norm)), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a if a[name] is not None)
    case.dy = torch.ones(()).expand(case.x.shape)
    expanded = case.backward(routed_norm)["dx"]
    case.dy = torch.ones(case.x.shape)
    assert torch.equal(expanded, case.backward(routed_norm)["dx"])


def test_no_rows_at_all() -> None:
    route = Route(torch.zeros(3, dtype=torch.int32), None, ((0, 1, 0), (1, 2, 1)))
    weights = [torch.randn(8), torch.randn(8)]
    empty = torch.empty(0, 8)
    y, z, mean, rstd = routed_norm.forward(empty, empty, weights, weights, route, "layer", EPS)
    assert y.shape == z.shape == (0, 8) and mean.shape == rstd.shape == (0,)
    with red_zones():
        dx, dw, db = routed_norm.backward(
            empty, empty, empty, weights, weights, mean, rstd, route, "layer", [True, True], [True, False]
        )
    assert dx.shape == (0, 8)
    assert all(torch.equal(g, torch.zeros(8)) for g in (*dw, db[0])) and db[1] is None


def test_too_wide_is_refused() -> None:
    x = torch.randn(1, 16385)
    route = Route(torch.tensor([0, 1], dtype=torch.int32), None, ((0, 1, 0),))
    with pytest.raises(NotImplementedError, match="at most 16384"):
        routed_norm.forward(x, None, [None], [None], route, "rms", EPS)


def test_launch_depends_on_capacity_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of one capacity: the same grids, constants and integers, as a captured graph needs."""
    launches = record_launches(monkeypatch)
    seen = []
    for offsets in ([0, 3, 9], [0, 8, 8]):
        case = Case("dead rows", 40, torch.float32, "layer")
        case.route = Route(torch.tensor(offsets, dtype=torch.int32), None, case.route.segments)
        case.x, case.dy = torch.randn(2, 13, 40)
        case.live = offsets[-1]
        case.forward(routed_norm), case.backward(routed_norm)
        seen.append(launches.copy())
        launches.clear()
    assert len(seen[0]) == 3 and seen[0] == seen[1]
