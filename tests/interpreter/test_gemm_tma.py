"""The routed GEMM through tensor descriptors, forced: the same rule, poison and red zones as the pointer path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.common.launches import record_launches
from tests.interpreter import test_routed_ffn, test_routed_linear
from tests.interpreter.test_routed_linear import DTYPES, ROUTES, Case, compare
from vlmo_kernels.kernels import gemm_tma, routed_linear
from vlmo_kernels.kernels.gemm import Config
from vlmo_kernels.tuning import tables

# several tiles along every side; a gated epilogue takes quarters
PLAIN = Config(32, 32, 32, 4, 2, parts=2, tma=True)
GATED = PLAIN._replace(parts=4)
FORCED = {
    "gemm": PLAIN, "input grad": PLAIN, "input grad activated": PLAIN, "gemm gated": GATED, "input grad gated": GATED,
}  # fmt: skip


@pytest.fixture(autouse=True)
def through_descriptors() -> Iterator[None]:
    with tables.forced({kernel: tuple(config) for kernel, config in FORCED.items()}):
        yield


def used(launches: list[tuple]) -> dict[str, bool]:
    """Kernel to whether its operands came through descriptors."""
    return {name: constants["TMA"] for name, *_, constants in launches if "TMA" in constants}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_routes(route: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = record_launches(monkeypatch)
    case = Case(route, 40, 24, dtype)
    compare(case)
    assert used(launches) == {"gemm_kernel": True, "input_grad_kernel": True}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k, n", [(32, 64), (8, 24), (72, 40), (40, 136)])
def test_widths(k: int, n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles, a part of one, and tails of the contraction and of the columns."""
    launches = record_launches(monkeypatch)
    compare(Case("dead rows", k, n, dtype, full=True, residual=dtype if k == 72 else None))
    assert all(used(launches).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_around_the_operands_does_not_matter(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows before, after and beside x and dy hold NaN, as do the columns that a tile takes past K."""
    case = Case("three experts", 40, 24, dtype)
    wanted = {"y": case.forward(routed_linear)} | case.backward(routed_linear)
    launches = record_launches(monkeypatch)
    for name in ("x", "dy"):
        t = getattr(case, name)
        wide = torch.full((t.shape[0] + 80, 128), torch.nan, dtype=dtype)
        wide[40:-40, 16 : 16 + t.shape[1]] = t
        setattr(case, name, wide[40:-40, 16 : 16 + t.shape[1]])
    actual = {"y": case.forward(routed_linear)} | case.backward(routed_linear)
    assert all(used(launches).values())
    for name, t in wanted.items():
        assert t is None if actual[name] is None else torch.equal(actual[name], t), name


def test_rows_of_other_experts_do_not_matter() -> None:
    """A tile reads over its segment's end: NaN there must stay there."""
    test_routed_linear.test_rows_of_other_experts_do_not_matter()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_ffn(activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations, gated ones with two weights, their derivative and the sums for the biases."""
    launches = record_launches(monkeypatch)
    test_routed_ffn.compare(test_routed_ffn.Case("dead rows", dtype, activation, d=40, f=72))
    assert used(launches) == {"gemm_kernel": True, "input_grad_kernel": True}


@pytest.mark.parametrize(
    "what", ["rows of 74 bytes", "weights of 74 bytes", "an odd address", "rows that overlap", "five segments"]
)
def test_what_has_no_descriptor_takes_pointers(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        ROUTES, "five segments", ((9, 40, 3, 33, 8), 0, ((0, 1, 0), (1, 2, 1), (2, 3, 2), (3, 4, 1), (4, 5, 0)))
    )
    route = what if what == "five segments" else "three experts"
    case = Case(route, 37 if what.endswith("74 bytes") else 40, 24, torch.float16)
    if what == "weights of 74 bytes":
        case.x = torch.nn.functional.pad(case.x, (0, 3))[:, :37]
    if what == "an odd address":
        case.x = torch.cat([case.x.new_zeros(1), case.x.flatten()])[1:].view(case.x.shape)
    if what == "rows that overlap":
        case.x = case.x[:1].expand(case.x.shape)
    launches = record_launches(monkeypatch)
    case.forward(routed_linear)
    assert used(launches) == {"gemm_kernel": False}
    compare(case)


def test_before_sm_90_there_are_no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:  # as far as `describe` looks
        device = torch.device("cuda", 0)

        def __getattr__(self, name: str):
            return getattr(torch.zeros(8, 8), name)

    for capability, wanted in (((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert gemm_tma._has_descriptor(OnGpu()) == wanted
