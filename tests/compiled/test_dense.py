"""The compiled dense layers on every instruction set this machine has."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.common.agreement import assert_problem_as_eager
from tests.common.cases import CASES
from tests.common.numerics import assert_close_as_eager
from tests.common.problems import PROBLEMS
from tests.common.red_zone import red_zones
from vlmo_kernels.cpu import dense, onednn
from vlmo_kernels.runtime import compiled

OPS = compiled.cpu_ops()
NAMES = ("avx2", "avx512", "avx512bf16")  # ascending, from 1 on; elsewhere oneDNN is used
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows, N, K: less than any tile; a rest in every direction; several tiles, panels and steps of the contraction
SHAPES = ((1, 1, 1), (3, 33, 7), (130, 70, 300), (129, 520, 257))
pytestmark = pytest.mark.skipif(OPS is None, reason=f"vlmo_kernels_cpu: {compiled.why_not('vlmo_kernels_cpu')}")


@pytest.fixture(params=NAMES)
def instructions(request, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VLMO_KERNELS_ISA", request.param)
    if OPS.isa() != NAMES.index(request.param) + 1:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["routed_linear-epilogue", "routed_ffn-full", "routed_ffn-gated_full"])
def test_as_close_as_eager(name: str, dtype: torch.dtype, instructions: str) -> None:
    assert_problem_as_eager(PROBLEMS[name], CASES.values(), dtype, impl="cpu", static=True, seeds=1)


class Layer:
    """Operands of one layer, activations with a row stride and an offset."""

    def __init__(self, rows: int, n: int, k: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.x, self.g, self.residual = (draw(rows, size + 3)[:, 1:-2] for size in (k, n, n))
        self.w, self.pre = draw(n, k) * k**-0.5, draw(rows, k)
        self.bias, self.gamma, self.row_scale = draw(n), draw(n), draw(rows).abs()

    def to(self, dtype: torch.dtype) -> Layer:
        new = object.__new__(Layer)
        new.__dict__ = {name: t.to(dtype) for name, t in self.__dict__.items()}
        return new

    def run(self, module, activation: str) -> dict[str, torch.Tensor]:
        """What the functions of `module` make of it."""
        y, pre = (self.g.new_empty(self.g.shape) for _ in range(2))
        w = module.prepare(self.w, len(self.x))
        module.forward_into(y, self.x, w, self.bias, activation, pre)
        full = self.g.new_empty(self.g.shape)
        module.forward_into(
            full, self.x, w, self.bias, gamma=self.gamma, residual=self.residual, row_scale=self.row_scale
        )
        dx = self.x.new_empty(self.x.shape)
        module.input_grad_into(dx, self.g, self.w, self.gamma)
        dpre, hidden, sums = module.activation_grad(self.g, self.w, self.gamma, activation, self.pre)
        dw, dots = module.weight_grads(self.g, self.x, self.w, self.gamma, True, True)
        names = ("y", "pre", "full", "dx", "dpre", "hidden", "sums", "dw", "dots")
        return dict(zip(names, (y, pre, full, dx, dpre, hidden, sums, dw, dots), strict=True))


class Eager:
    """The same functions op by op in torch."""

    @staticmethod
    def prepare(w, rows):
        return w

    @staticmethod
    def forward_into(out, x, w, bias, activation="none", pre=None, gamma=None, residual=None, row_scale=None):
        z = torch.nn.functional.linear(x, w, bias)
        if pre is not None:
            pre.copy_(z)
        y = onednn.activate(activation, z)
        if gamma is not None:
            y = residual + row_scale[:, None] * (gamma * y)
        out.copy_(y)

    @staticmethod
    def input_grad_into(dx, g, w, gamma):
        dx.copy_((g * gamma) @ w)

    @staticmethod
    def activation_grad(g, w, gamma, activation, pre):
        leaf = pre.clone().requires_grad_()
        hidden = onednn.activate(activation, leaf)
        hidden.backward((g * gamma) @ w)
        wide = torch.promote_types(pre.dtype, torch.float32)
        return leaf.grad, hidden.detach(), leaf.grad.sum(0, dtype=wide)

    @staticmethod
    def weight_grads(g, x, w, gamma, need_dw, need_dots):
        unscaled = g.T @ x
        wide = torch.promote_types(x.dtype, torch.float32)
        return unscaled * gamma[:, None], (w * unscaled).sum(1, dtype=wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", dense.ACTIVATIONS[1:])
def test_shapes(activation: str, dtype: torch.dtype, instructions: str) -> None:
    """All shapes of a result are judged together: the largest of a few errors is chance."""
    found: dict[str, list] = {}
    for shape in SHAPES:
        layer = Layer(*shape).to(dtype)
        with red_zones():
            mine = layer.run(dense, activation)
        right, eager = layer.to(torch.float64).run(Eager, activation), layer.run(Eager, activation)
        for name in mine:
            found.setdefault(name, []).append([t.flatten() for t in (mine[name], right[name], eager[name])])
    for name, parts in found.items():
        assert_close_as_eager(*(torch.cat(part) for part in zip(*parts, strict=True)), name)


@pytest.mark.parametrize("activation", dense.ACTIVATIONS)
def test_activations_alone(activation: str, instructions: str) -> None:
    """Over the whole range and at its ends, through a layer that changes nothing; fp32 shows the formula itself."""
    ends = [torch.nan, 0.0, -0.0, 88.0, -88.0, 1e30, -1e30, 1e-40, -1e-40, 13.3, -13.3]
    z = torch.cat([torch.linspace(-14, 14, 4001), torch.tensor(ends)])[:, None]
    one, pre, y = torch.ones(1, 1), torch.empty_like(z), torch.empty_like(z)
    same = dense.prepare(one, len(z))
    dense.forward_into(y, z, same, None, activation, pre)
    assert torch.equal(pre.nan_to_num(1.5), z.nan_to_num(1.5))
    assert_close_as_eager(y, onednn.activate(activation, z.double()), onednn.activate(activation, z), activation)
    dense.forward_into(y[:1], torch.full((1, 1), torch.inf), same, None, activation)
    assert y[0] == torch.inf
    dense.forward_into(y, z, same, None, activation)
    if activation != "none":
        g = torch.ones_like(z)
        dpre, hidden, _ = dense.activation_grad(g, one, None, activation, z)
        assert torch.equal(hidden.nan_to_num(1.5), y.nan_to_num(1.5))
        right, eager = (onednn.activation_backward(activation, g.to(t), z.to(t)) for t in (torch.double, torch.float))
        assert_close_as_eager(dpre, right, eager, f"derivative of {activation}")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("activation", dense.ACTIVATIONS[1:])
def test_activations_of_every_16_bit_number(activation: str, dtype: torch.dtype, instructions: str) -> None:
    """They are computed with fewer digits than fp32 has; that adds half a rounding at the most."""
    z = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    z = z[z.abs() <= 6][:, None]
    one, y = torch.ones(1, 1, dtype=dtype), torch.empty_like(z)
    dense.forward_into(y, z, dense.prepare(one, len(z)), None, activation)
    dpre, hidden, _ = dense.activation_grad(torch.ones_like(z), one, None, activation, z)
    assert torch.equal(hidden, y)
    leaf = z.double().requires_grad_()
    value = onednn.activate(activation, leaf)
    value.sum().backward()
    limits = torch.finfo(dtype)
    for got, right in ((y, value.detach()), (dpre, leaf.grad)):
        # dot products of bf16 take denormals for zeros
        allowed = (0.75 * limits.eps * right.abs()).clamp_min(limits.smallest_normal)
        if got is dpre:  # a sum of two parts of either sign
            allowed = allowed.clamp_min(limits.eps / 8)
        assert ((got.double() - right).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_around_the_caches(dtype: torch.dtype, instructions: str) -> None:
    """Large results for backward, in whole lines, are the same bits as the few rows that go through the caches."""
    layer, few = Layer(2200, 992, 40).to(dtype), slice(2100, 2200)
    y, pre = (torch.empty(2200, 992, dtype=dtype) for _ in range(2))
    w = dense.prepare(layer.w, 2200)
    dense.forward_into(y, layer.x, w, layer.bias, "gelu", pre)
    large = dense.activation_grad(layer.x, layer.w.T.contiguous(), None, "gelu", pre)
    small_y, small_pre = (torch.empty(100, 992, dtype=dtype) for _ in range(2))
    dense.forward_into(small_y, layer.x[few], w, layer.bias, "gelu", small_pre)
    small = dense.activation_grad(layer.x[few], layer.w.T.contiguous(), None, "gelu", small_pre)
    assert pre.nbytes >= 2**22 and torch.equal(y[few], small_y) and torch.equal(pre[few], small_pre)
    assert torch.equal(large[0][few], small[0]) and torch.equal(large[1][few], small[1])


@pytest.mark.parametrize("module", [dense, onednn])
def test_long_sums_are_as_exact_as_those_of_the_library(module, instructions: str) -> None:
    """K of VLMo's second layer: one long chain of additions would lose a digit more than a library's product."""
    layer = Layer(64, 64, 3072)
    y = torch.empty(64, 64)
    module.forward_into(y, layer.x, module.prepare(layer.w, 64), None)
    right = layer.x.double() @ layer.w.double().T
    assert_close_as_eager(y, right, layer.x @ layer.w.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_at_every_thread_count(dtype: torch.dtype, instructions: str) -> None:
    layer, threads, results = Layer(300, 290, 130).to(dtype), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(layer.run(dense, "gelu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_depth_in_pieces(dtype: torch.dtype, instructions: str) -> None:
    """Sums of pieces of the depth are kept in fp32: in a layer, and over the tokens of a weight gradient."""
    layer = Layer(40, 50, 4500).to(dtype)
    right, eager = layer.to(torch.float64).run(Eager, "gelu"), layer.run(Eager, "gelu")
    mine = layer.run(dense, "gelu")
    for name in ("y", "pre", "full"):
        assert_close_as_eager(mine[name], right[name], eager[name], name)
    tokens = Layer(2100, 90, 70).to(dtype)
    right, eager = tokens.to(torch.float64).run(Eager, "gelu"), tokens.run(Eager, "gelu")
    mine = tokens.run(dense, "gelu")
    for name in ("dw", "dots"):
        assert_close_as_eager(mine[name], right[name], eager[name], name)


@pytest.mark.parametrize("rows", (193, 1600))
def test_the_largest_tile(rows: int, instructions: str) -> None:
    """Tiles shrink until all threads have work; here one thread has enough, and the last tile is a rest both ways."""
    layer, threads = Layer(rows, 770, 40), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        mine = layer.run(dense, "gelu")
    finally:
        torch.set_num_threads(threads)
    right, eager = layer.to(torch.float64).run(Eager, "gelu"), layer.run(Eager, "gelu")
    for name in mine:
        assert_close_as_eager(mine[name], right[name], eager[name], name)


def test_an_infinite_gradient_ends_at_a_closed_relu(instructions: str) -> None:
    pre = torch.tensor([[-1.0, 0.0, -0.0, 2.0, torch.nan, -torch.nan]])
    for value in (torch.inf, torch.nan, 2.0):
        g = torch.full((1, 6), value)
        dpre, _, _ = dense.activation_grad(g, torch.eye(6).mul(1.0), None, "relu", pre)
        expected = onednn.activation_backward("relu", g @ torch.eye(6), pre)
        assert torch.equal(dpre.isnan(), expected.isnan()) and torch.equal(dpre.nan_to_num(), expected.nan_to_num())


def test_expanded_operands_and_empty_sides(instructions: str) -> None:
    """A residual of one row for all, a contraction of nothing, and no columns."""
    layer = Layer(70, 40, 30)
    y, row = torch.empty(70, 40), torch.randn(40)
    w = dense.prepare(layer.w, 70)
    dense.forward_into(y, layer.x, w, None, residual=row.expand(70, 40))
    assert_close_as_eager(y, row.double() + layer.x.double() @ layer.w.double().T, row + layer.x @ layer.w.T)
    nothing = torch.empty(40, 0)
    dense.forward_into(y, torch.empty(70, 0), dense.prepare(nothing, 70), row)
    assert torch.equal(y, row.expand(70, 40))
    dense.forward_into(torch.empty(70, 0), layer.x, dense.prepare(torch.empty(0, 30), 70), None)


def test_threads_of_python_do_not_share_memory(instructions: str) -> None:
    layers = [Layer(100, 60, 50, seed) for seed in range(8)]
    alone = [layer.run(dense, "gelu") for layer in layers]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda layer: layer.run(dense, "gelu"), layers))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(alone, together, strict=True) for name in a)


def test_nan_stays_in_its_row(instructions: str) -> None:
    layer = Layer(20, 40, 50)
    layer.x[7, 3] = torch.nan
    y = layer.run(dense, "gelu")["full"]
    others = torch.arange(20) != 7
    assert y[7].isnan().all() and y[others].isfinite().all()


def test_bad_operands_are_named(instructions: str) -> None:
    x, w, y = torch.ones(4, 8), torch.ones(6, 8), torch.empty(4, 6)
    panels = OPS.pack_weight(w, False)
    with pytest.raises(RuntimeError, match=r"`panels` must be what pack_weight makes of a weight of 40 by 8"):
        OPS.dense(x, panels, None, 0, None, None, None, None, torch.empty(4, 40))
    with pytest.raises(RuntimeError, match=r"`bias` must be fp32 \[6\], contiguous"):
        OPS.dense(x, panels, torch.ones(5), 0, None, None, None, None, y)
    with pytest.raises(RuntimeError, match=r"`activation` must be 0 to 4, got 5"):
        OPS.dense(x, panels, None, 5, None, None, None, None, y)
    with pytest.raises(RuntimeError, match=r"`residual` must be \[4, 6\], its rows in one piece"):
        OPS.dense(x, panels, None, 0, None, None, torch.ones(6, 4).T, None, y)
    with pytest.raises(RuntimeError, match=r"`residual` must have the dtype of the result"):
        OPS.dense(x, panels, None, 0, None, None, y.half(), None, y)
    with pytest.raises(RuntimeError, match=r"`dy` must be \[4, 6\], its rows in one piece"):
        OPS.weight_grad(torch.ones(5, 6), x, None, None, w)
    with pytest.raises(RuntimeError, match=r"`w` must have the dtype of the result"):
        OPS.weight_grad(y, x, None, w.half(), w)
    with pytest.raises(RuntimeError, match=r"`pre` belongs to an activation"):
        OPS.dense_backward(y, None, OPS.pack_weight(w, True), 1, None, None, False, x)
