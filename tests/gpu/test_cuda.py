"""What only CUDA has: graphs, queues that nothing may wait for, and memory past 2^31 elements."""

from __future__ import annotations

import pytest
import torch

import vlmo_kernels as vk
from tests.gpu.device import WIDTH, gradients, make_block, make_layout, rows_for


@pytest.mark.parametrize("static", [False, True], ids=["lengths on the host", "lengths on the device"])
def test_nothing_waits_for_the_device(static: bool) -> None:
    block, layout = make_block(), make_layout()
    if static:
        ids = (torch.arange(64, device="cuda") >= 16).long().expand(8, 64)
        layout = vk.ModalityLayout.from_modality_ids(ids, modalities=("text", "image"))
    x, dy = rows_for(layout).requires_grad_(), rows_for(layout, seed=2)
    leaves = [x, *block.parameters()]
    gradients(block, leaves, layout, x, dy)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(block, leaves, layout, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def plans():
    """Masks of different density over the same ids, their plans, and padded rows."""
    ids = (torch.arange(64, device="cuda") >= 16).long().expand(8, 64)
    generator = torch.Generator("cuda").manual_seed(0)
    masks = [torch.rand(8, 64, device="cuda", generator=generator) < p for p in (0.9, 0.4, 0.7)]
    made = [vk.ModalityLayout.from_modality_ids(ids, m, modalities=("text", "image")) for m in (masks[0], *masks)]
    padded = torch.randn(8, 64, WIDTH, device="cuda", dtype=torch.bfloat16, generator=generator)
    return made[0], made[1:], padded


def test_graph_replay_with_new_lengths() -> None:
    block = make_block().eval()
    plan, others, padded = plans()
    with torch.no_grad():
        expected = [p.unpack(block(p.pack_padded(padded), p)) for p in others]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = plan.unpack(block(plan.pack_padded(padded), plan))
        for new, right in zip(others, expected, strict=True):
            plan.copy_(new)
            graph.replay()
            assert torch.equal(out, right)


def test_graph_of_a_training_step_with_new_lengths() -> None:
    block = make_block()
    plan, others, padded = plans()
    parameters = list(block.parameters())

    def step(p: vk.ModalityLayout) -> list[torch.Tensor]:
        y = p.unpack(block(p.pack_padded(padded), p))
        return [y.detach(), *torch.autograd.grad(y, parameters, padded)]

    expected = [step(p) for p in others]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(plan)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(plan)
    for new, right in zip(others, expected, strict=True):
        plan.copy_(new)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def needs(count: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    assert free > count, f"needs {count} bytes of device memory, {free} are free"


def test_linear_past_two_to_the_31() -> None:
    rows, width = 2**31 // 4096 + 300, 4096
    needs(3 * rows * width * 2)
    layout = vk.ModalityLayout.from_lengths({"text": [rows - 200], "image": [200]}, device="cuda")
    x = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    x[-200:] = torch.randn(200, width, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(width, width, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(2)]
    alone = vk.ModalityLayout.from_lengths({"text": [0], "image": [200]}, device="cuda")
    last = x[-200:].clone()
    right = vk.routed_linear(last.requires_grad_(), weights, None, alone, impl="triton")
    (dright,) = torch.autograd.grad(right, last, right)
    y = vk.routed_linear(x.requires_grad_(), weights, None, layout, impl="triton")
    assert torch.equal(y[-200:], right)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    assert torch.equal(dx[-200:], dright)


def test_attention_and_norm_past_two_to_the_31() -> None:
    heads, head_dim, length = 32, 128, 512
    rows = 2**31 // (heads * head_dim) // length * length + 2 * length
    needs(5 * rows * heads * head_dim * 2)
    layout = vk.ModalityLayout.from_lengths({"text": [0] * (rows // length), "image": length}, device="cuda")
    alone = vk.ModalityLayout.from_lengths({"text": [0], "image": length}, device="cuda")
    q = torch.zeros(rows, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    q[-length:] = torch.randn(length, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    last = q[-length:].clone()
    o = vk.shared_attention(q, q, q, layout, impl="triton")
    assert torch.equal(o[-length:], vk.shared_attention(last, last, last, alone, impl="triton"))
    del o
    weight = [torch.randn(heads * head_dim, device="cuda", dtype=torch.bfloat16)] * 2
    flat = q.view(rows, -1)
    y = vk.routed_norm(flat, weight, None, layout, kind="rms", impl="triton")
    assert torch.equal(y[-length:], vk.routed_norm(flat[-length:], weight, None, alone, kind="rms", impl="triton"))
