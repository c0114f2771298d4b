"""Every op on the GPU: every variant, output and gradient against fp64, in the dtypes the kernels take."""

from __future__ import annotations

import pytest
import torch

import vlmo_kernels as vk
from tests.common.agreement import assert_problem_as_eager
from tests.common.cases import CASES, Case
from tests.common.problems import PROBLEMS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(problem):
    """The problem's own function, on the device; leaves and results stay where the checker has them."""

    def ours(leaves, case: Case, layout: vk.ModalityLayout, impl: str):
        with torch.device("cuda"):
            moved = {name: t.cuda() for name, t in leaves.items()}
            return tuple(o.cpu() for o in problem.ours(moved, case, layout.to("cuda"), impl))

    return ours


@pytest.fixture(autouse=True)
def full_fp32():
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_close_as_eager(name: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]
    assert_problem_as_eager(problem, CASES.values(), dtype, ours=on_gpu(problem), impl="triton", static=True)


def training_step(seed: int, dtype: torch.dtype = torch.bfloat16):
    torch.manual_seed(seed)
    block = vk.MoMEBlock(256, 4, impl="triton").to("cuda", dtype)
    lengths = torch.randint(0, 40, (16,)).tolist()
    layout = vk.ModalityLayout.from_lengths({"text": lengths, "image": 197}, device="cuda")
    x = torch.randn(layout.tokens, 256, device="cuda", dtype=dtype).requires_grad_()
    dy = torch.randn_like(x)

    def step():
        grads = torch.autograd.grad(block(x, layout), [x, *block.parameters()], dy)
        return [block(x, layout).detach(), *grads]

    return step


def test_a_thousand_repeats_are_bitwise_equal():
    step = training_step(0)
    first = step()
    for _ in range(1000):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_nothing_waits_for_the_device():
    step = training_step(1)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replay_with_new_lengths():
    torch.manual_seed(0)
    block = vk.MoMEBlock(256, 4, impl="triton").to("cuda", torch.bfloat16).eval()
    ids = (torch.arange(64, device="cuda") >= 16).long().expand(8, 64)
    masks = [torch.rand(8, 64, device="cuda") < p for p in (0.9, 0.4, 0.7)]
    plans = [vk.ModalityLayout.from_modality_ids(ids, m, modalities=("text", "image")) for m in masks]
    padded = torch.randn(8, 64, 256, device="cuda", dtype=torch.bfloat16)
    plan = vk.ModalityLayout.from_modality_ids(ids, masks[0], modalities=("text", "image"))
    with torch.no_grad():
        expected = [p.unpack(block(p.pack_padded(padded), p)) for p in plans]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = plan.unpack(block(plan.pack_padded(padded), plan))
        for new, right in zip(plans, expected, strict=True):
            plan.copy_(new)
            graph.replay()
            assert torch.equal(out, right)


def test_compiled_block_equals_eager():
    torch.manual_seed(0)
    block = vk.MoMEBlock(256, 4).to("cuda", torch.bfloat16)
    layout = vk.ModalityLayout.from_lengths({"text": [7, 0, 12], "image": [50, 50, 0]}, device="cuda")
    x = torch.randn(layout.tokens, 256, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(torch.compile(block, fullgraph=True)(x, layout), block(x, layout))


def test_offsets_past_two_to_the_31():
    rows, width = 2**31 // 4096 + 300, 4096
    free, _ = torch.cuda.mem_get_info()
    needed = 3 * rows * width * 2
    assert free > needed, f"needs {needed} bytes of device memory, {free} are free"
    layout = vk.ModalityLayout.from_lengths({"text": [rows - 200], "image": [200]}, device="cuda")
    x = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    x[-200:] = torch.randn(200, width, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(width, width, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(2)]
    y = vk.routed_linear(x, weights, None, layout, impl="triton")
    alone = vk.ModalityLayout.from_lengths({"text": [0], "image": [200]}, device="cuda")
    assert torch.equal(y[-200:], vk.routed_linear(x[-200:].clone(), weights, None, alone, impl="triton"))


def test_without_a_usable_kernel_auto_refuses():
    layout = vk.ModalityLayout.from_lengths({"text": 3}, device="cuda")
    x = torch.ones(3, 4, device="cuda", dtype=torch.float64)
    with pytest.raises(RuntimeError, match="triton: has no kernels for torch.float64.*Hint: impl='reference'"):
        vk.routed_linear(x, [torch.ones(2, 4, device="cuda", dtype=torch.float64)], None, layout)
