"""The peers of the suite `attention` that a CPU can run in part or not at all: FlexAttention and xformers.

What their kernels compute is played by plain torch, so that layouts, masks, biases and gradients are judged here.
"""

from __future__ import annotations

import pytest
import torch
import xformers.ops
from xformers.ops.fmha import cutlass
from xformers.ops.fmha.common import Inputs

from vlmo_kernels.bench import attention, baselines, harness
from vlmo_kernels.bench.cases import CASES, Case

# Lengths that are no multiples of 8, and samples of one modality only.
CASE = Case("mixed", 32, 2, 64, (3, 0, 5), (6, 6, 0), 5, 6)
PASSES = ("forward", "training")


def judged(case: Case, pass_: str, dtype: torch.dtype = torch.float32) -> dict[str, harness.Result]:
    """Every contestant's verdict."""
    contestants, expected = attention.build(case, "cpu", dtype, pass_)
    return {r.name: r for r in harness.gate(contestants, expected, pass_, attention.EAGER)}


def attend(q, k, v, added, scale):
    return (q @ k.transpose(-2, -1) * scale + added).softmax(-1) @ v


def plain_flex(q, k, v, score_mod, block_mask):
    rows = torch.arange(q.shape[2])[:, None]
    heads, columns = torch.arange(q.shape[1])[:, None, None], rows.T
    seen = block_mask.mask_mod(0, 0, rows, columns)
    bias = score_mod(torch.zeros(()), 0, heads, rows, columns)
    return attend(q, k, v, bias.masked_fill(~seen, float("-inf")), q.shape[-1] ** -0.5)


@pytest.fixture
def biases(monkeypatch) -> list[torch.Tensor]:
    """xformers is there and runs; what it was given as bias."""
    given = []

    def plain_xformers(query, key, value, attn_bias, scale):
        given.append(attn_bias)
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return attend(q, k, v, attn_bias, scale).transpose(1, 2)

    monkeypatch.setattr(attention, "why_no_xformers", lambda device: "")
    monkeypatch.setattr(xformers.ops, "memory_efficient_attention", plain_xformers)
    return given


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(baselines, "flex_attention", plain_flex)


@pytest.mark.parametrize("pass_", PASSES)
def test_layouts_and_gradients_are_right(pass_, nothing_compiled, biases):
    found = judged(CASE, pass_)
    assert {name: r.skipped for name, r in found.items()} == dict.fromkeys(found, "")
    assert {"flex", "xformers"} < set(found) and all(r.verdict.ok for r in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xformers_accepts_the_bias(dtype, biases, nothing_compiled):
    """By its own checks, of which on a CPU only those of the device may fail."""
    assert not judged(CASE, "training", dtype)["xformers"].skipped
    added = biases[0]
    assert added.dtype == dtype and added.shape == (3, 2, 11, 11) and added.requires_grad
    assert torch.equal(added[1, 0].isinf().any(0), torch.arange(11) < 5)  # the second sample has no text
    q = torch.zeros(3, 11, 2, 16, dtype=dtype)
    inputs = Inputs(q, q, q, attn_bias=added)
    inputs.validate_inputs()
    for op in (cutlass.FwOp, cutlass.BwOp):
        assert all(reason.startswith(("device=cpu", "bf16 is only")) for reason in op.not_supported_reasons(inputs))
    misaligned = Inputs(q, q, q, attn_bias=added.contiguous())
    assert any("stride" in reason for reason in cutlass.BwOp.not_supported_reasons(misaligned))


def test_the_bias_that_xformers_keeps_is_counted(biases, nothing_compiled):
    kept = judged(CASE, "training")["xformers"].saved_bytes
    contestants, _ = attention.build(CASE, "cpu", torch.float32, "training")
    found = next(c for c in contestants if c.name == "xformers")
    assert found.unseen_bytes == 3 * 2 * 11 * 16 * 4 and kept > found.unseen_bytes
    found.forward()
    assert biases[-1].untyped_storage().nbytes() == found.unseen_bytes


def test_xformers_is_named_where_it_cannot_run(monkeypatch, nothing_compiled):
    assert judged(CASE, "forward")["xformers"].skipped == "not here: its kernels need a GPU"
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    assert attention.why_no_xformers("cuda") == "xformers is not installed"
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    assert attention.why_no_xformers("cuda") == ""


def test_flex_itself_on_a_cpu():
    """Compiled and judged in inference; its lack of a backward is said in its own words."""
    torch.compiler.reset()
    found = judged(CASES["smoke"], "forward")["flex"]
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        assert not found.skipped and found.verdict.ok
    else:  # Inductor's kernel needs AVX2
        assert found.skipped.startswith("failed: ")
    found = judged(CASES["smoke"], "training")["flex"]
    assert "backward on CPU" in found.skipped or (found.verdict.ok and not found.skipped)
