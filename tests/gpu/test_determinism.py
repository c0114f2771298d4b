"""The same bits every time, and whatever the number of warps: races and missing barriers show here."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.device import DEVICE, SMALL, gradients, make_block, make_layout, rows_for, through_descriptors
from vlmo_kernels.kernels import gemm, gemm_grad, shared_attention
from vlmo_kernels.tuning import tables

REPEATS = 1 if SMALL else 1000


def assert_repeats(call) -> None:
    first = [t.clone() for t in call()]
    for i in range(REPEATS):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True)), f"repeat {i} differs"


@pytest.mark.parametrize("route", ["default", "cublas", "long"])
def test_a_training_step_repeats(route: str) -> None:
    """As shipped; with torch's GEMMs; with the two-kernel attention backward."""
    block, layout = make_block(), make_layout()
    x = rows_for(layout).requires_grad_()
    dy = rows_for(layout, seed=2)
    kernels = ("gemm", "input grad", "input grad activated", "weight grad")
    forced = {"cublas": dict.fromkeys(kernels, tables.CUBLAS), "long": {"attention short": tables.LONG}}
    with tables.forced(forced.get(route, {})):
        assert_repeats(lambda: gradients(block, [x, *block.parameters()], layout, x, dy))


def products():
    """name, kernel, tile and call of every product whose sums run in the order of the contraction alone."""
    layout = make_layout()
    route, rows = layout.route({"text": 0, "image": 1}, 2), layout.tokens
    n, k = (40, 48) if SMALL else (384, 320)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(rows, c, generator=generator).to(DEVICE, torch.bfloat16) for c in (k, n))
    w = [torch.randn(n, k, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(2)]
    b = [torch.randn(n, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(2)]
    yield "gemm", lambda: gemm.gemm(x, w, b, route, activation="gelu")[0]
    yield "input grad", lambda: gemm_grad.input_grad(dy, w, route).dx
    yield "weight grad", lambda: torch.stack(gemm_grad.weight_grad(dy, x, w, route, [True] * 2)[0])


@pytest.mark.parametrize("kernel", ["gemm", "input grad", "weight grad"])
def test_eight_warps_equal_four(kernel: str) -> None:
    call = dict(products())[kernel]
    found = []
    for warps in (4, 8):
        tile = (32, 32, 32, warps, 2) if SMALL else (128, 128, 64, warps, 3)
        with tables.forced({kernel: tile if kernel == "weight grad" else (*tile, 2, None)}):
            found.append(call())
            assert_repeats(lambda: [call()])
    assert torch.equal(*found)


@pytest.mark.parametrize("kernel", ["gemm", "input grad"])
def test_descriptors_equal_pointers(kernel: str) -> None:
    """The same products in the same order, however the operands come; and a thousand times so."""
    call = dict(products())[kernel]
    found = []
    for warps, stages in ((4, 3), (8, 3), (8, 4)):
        tile = (32, 32, 32, warps, 2, 2, None) if SMALL else (128, 128, 64, warps, stages, 2, None)
        with tables.forced({kernel: tile}):
            found.append(call())
        with through_descriptors({kernel: (*tile, True)}):
            found.append(call())
            assert_repeats(lambda: [call()])
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kernel", ["fwd", "dq", "dkdv", "short", "dbias"])
@pytest.mark.parametrize("warps", [4, 8])
def test_attention_repeats(kernel: str, warps: int) -> None:
    layout = make_layout()
    seqs, heads, head_dim = layout.sequences(), 2, 64
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (
        torch.randn(layout.tokens, heads, head_dim, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(4)
    )
    bias = torch.randn(heads, layout.max_seqlen, layout.max_seqlen, generator=generator).to(DEVICE)
    tile = (256, 32, warps, 2) if kernel == "short" else (64, 32, warps, 2)
    choices = {f"attention {kernel} bias": tile}
    if kernel in ("dq", "dkdv"):
        choices["attention short bias"] = tables.LONG
    out = tuple(torch.empty_like(t) for t in (q, k, v))

    def call():
        o, lse = shared_attention.forward(q, k, v, seqs, bias, False, None, head_dim**-0.5)
        dbias = shared_attention.backward(
            do, q, k, v, o, lse, seqs, bias, False, None, head_dim**-0.5, kernel == "dbias", out
        )
        return [o, lse, *out] + ([] if dbias is None else [dbias])

    with tables.forced(choices):
        assert_repeats(call)
