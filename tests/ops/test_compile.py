"""Level 3: every op under `torch.compile(fullgraph=True)` and `torch.export`, and how often that compiles."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo as dynamo
from torch._dynamo.testing import CompileCounterWithBackend

import vlmo_kernels as vk
from tests.common.cases import CASES, EXPERTS, MODALITIES, Case
from tests.common.problems import PROBLEMS, Leaves, Outputs, Problem

# One of each op, with every argument it has.
VARIANTS = (
    "routed_linear-epilogue",
    "routed_norm-layer_residual",
    "routed_norm-rms1p",
    "routed_ffn-full",
    "routed_ffn-gated_full",
    "shared_attention-prefix_bias",
    "shared_attention-packed",
    "mome_block-vlmo",
)
SIZES = (CASES["several_runs"], CASES["mixed_kinds"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    dynamo.reset()
    yield
    dynamo.reset()


def assert_compiled_is_eager(problem: Problem, case: Case, static: bool, compiled) -> None:
    leaves, layout = problem.leaves(case, torch.float32), case.layout(static)
    expected, expected_grads = problem.run(problem.ours, leaves, case, layout, "auto")
    values, grads = problem.run(compiled, leaves, case, layout, "auto")
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("static", [False, True], ids=["exact", "static"])
@pytest.mark.parametrize("name", VARIANTS)
def test_fullgraph(name: str, static: bool) -> None:
    problem = PROBLEMS[name]
    compiled = torch.compile(problem.ours, fullgraph=True, backend="aot_eager")
    for case in SIZES:
        assert_compiled_is_eager(problem, case, static, compiled)


def test_fullgraph_with_inductor() -> None:
    problem = PROBLEMS["mome_block-vlmo"]
    compiled = torch.compile(problem.ours, fullgraph=True)
    assert_compiled_is_eager(problem, SIZES[0], True, compiled)


def planned_block(leaves: Leaves, ids: torch.Tensor, mask: torch.Tensor) -> Outputs:
    """The plan made inside of the compiled function, as a swapped block does."""
    layout = vk.ModalityLayout.from_modality_ids(ids, mask, modalities=MODALITIES)
    return PROBLEMS["mome_block-vlmo"].ours(leaves, SIZES[0], layout, "auto")


def random_batch(seed: int, batch: int, length: int) -> tuple[Case, Leaves, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2, (batch, length), generator=generator)
    mask = torch.rand(batch, length, generator=generator) < 0.8
    runs = tuple(tuple((MODALITIES[i], 1) for i in row) for row in ids.tolist())
    case = Case("random", "", runs)
    return case, PROBLEMS["mome_block-vlmo"].leaves(case, torch.float32, seed), ids, mask


def test_plan_inside_of_the_compiled_function() -> None:
    compiled = torch.compile(planned_block, fullgraph=True, backend="aot_eager")
    problem = PROBLEMS["mome_block-vlmo"]
    for batch, length in ((3, 9), (2, 14)):
        _, leaves, ids, mask = random_batch(0, batch, length)
        expected, expected_grads = problem.run(planned_block, leaves, ids, mask)
        values, grads = problem.run(compiled, leaves, ids, mask)
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(grads, expected_grads)


def two_blocks(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        layout = vk.ModalityLayout.from_modality_ids(ids, modalities=MODALITIES)
        x = layout.unpack(layout.pack_padded(x) + 1)
    return x


def test_plans_of_one_mask_are_merged() -> None:
    """Every block plans for itself; in training, common-subexpression elimination leaves one plan.

    Inductor does not eliminate calls of custom ops from graphs without a backward.
    """
    from torch._inductor.utils import run_and_get_code

    x = torch.randn(2, 5, 3, requires_grad=True)
    _, code = run_and_get_code(torch.compile(two_blocks, fullgraph=True), x, torch.ones(2, 5).long())
    assert sum(text.count("torch.ops.vlmo_kernels.plan.default(") for text in code) == 1


def count_compilations(function, batches, dynamic: bool | None = None) -> list[int]:
    """Compilations so far, after every batch."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
    counts = []
    for arguments in batches:
        torch.autograd.backward([y.sum() for y in compiled(*arguments)])
        counts.append(counter.frame_count)
    return counts


def test_twenty_random_batches_compile_twice() -> None:
    """Ids and masks vary, then sizes too: once for the first size, once for any size, never again."""
    batches = []
    for seed in range(20):
        _, leaves, ids, mask = random_batch(seed, 2 + seed % 3, 7 + seed % 5)
        batches.append((leaves, ids, mask))
    counts = count_compilations(planned_block, batches)
    assert counts[-1] <= 2, counts
    assert counts[-1] == counts[4], f"compiled again after warm-up: {counts}"


def test_routing_alone_never_compiles_again() -> None:
    batches = [random_batch(seed, 3, 9)[1:] for seed in range(20)]
    assert count_compilations(planned_block, batches) == [1] * 20


def exact_ffn(leaves: Leaves, layout: vk.ModalityLayout) -> Outputs:
    w1, w2 = ([leaves[f"{n}.{e}"] for e in range(3)] for n in ("w1", "w2"))
    return (vk.routed_ffn(leaves["x"], w1, None, w2, None, layout, EXPERTS),)


def test_layouts_from_the_host_compile_twice() -> None:
    """A layout passed in: its offsets are tensors, so other lengths are other values, not other code."""
    batches = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 9, (2, 3), generator=generator).tolist()
        layout = vk.ModalityLayout.from_lengths(dict(zip(MODALITIES, lengths, strict=True)))
        leaves = PROBLEMS["routed_ffn-gelu"].leaves(CASES["no_tokens"], torch.float32)
        leaves["x"] = torch.randn(layout.tokens, leaves["x"].shape[-1], requires_grad=True)
        batches.append((leaves, layout))
    counts = count_compilations(exact_ffn, batches)
    assert counts[-1] <= 2 and counts[-1] == counts[4], counts


class Block(torch.nn.Module):
    """A user's block: plans from its own mask, packs, runs and unpacks."""

    def __init__(self, leaves: Leaves) -> None:
        super().__init__()
        self.names = [name for name in leaves if name != "x"]
        self.weights = torch.nn.ParameterList([leaves[name].detach() for name in self.names])

    def forward(self, x: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        leaves = dict(zip(self.names, self.weights, strict=True))
        return planned_block({"x": x, **leaves}, ids, mask)[0]


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    _, leaves, ids, mask = random_batch(0, 3, 9)
    block = Block(leaves).eval()
    x = leaves["x"].detach()
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=512)
    shape = {0: batch, 1: length}
    program = torch.export.export(block, (x, ids, mask), dynamic_shapes=(shape, shape, shape), strict=strict)
    for seed, size in enumerate(((3, 9), (5, 4))):
        _, other, ids, mask = random_batch(seed, *size)
        with torch.no_grad():
            torch.testing.assert_close(
                program.module()(other["x"], ids, mask), block(other["x"], ids, mask)
            )
