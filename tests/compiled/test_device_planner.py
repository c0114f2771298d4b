"""The device planner: its CPU build against the plan in torch, its CUDA build by what nvcc says of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmo_kernels as vk
from tests.common.cases import CASES
from tests.compiled.twin import TABLES
from vlmo_kernels import plan as planning
from vlmo_kernels.runtime import compiled

ROOT = Path(__file__).resolve().parents[2]
built = pytest.mark.skipif(
    compiled.cpu_ops() is None, reason=f"compiled CPU ops: {compiled.why_not('vlmo_kernels_cpu')}"
)
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def assert_is_plan_in_torch(ids: torch.Tensor, mask: torch.Tensor | None, modalities: int) -> None:
    ours = torch.ops.vlmo_kernels_cpu.plan(ids, mask, modalities)
    expected = planning.plan_in_torch(ids, mask, modalities)
    for name, a, b in zip(TABLES, ours, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), name


@st.composite
def batches(draw):
    """Ids that include unknown ones, padding anywhere, a mask or none, any strides; sizes about those of a block."""
    modalities = draw(st.integers(1, 15))
    batch = draw(st.one_of(st.integers(0, 20), st.sampled_from((63, 64, 65, 100))))
    length = draw(st.one_of(st.integers(0, 70), st.sampled_from((237, 1000))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    few = draw(st.integers(1, modalities + 2))
    ids = torch.randint(-2, few, (batch, length), generator=generator)
    ids = ids.to(draw(st.sampled_from((torch.int64, torch.int32))))
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, length, generator=generator) < draw(st.sampled_from((0.05, 0.5, 1.1)))
    strides = draw(st.sampled_from(("compact", "transposed", "expanded", "offset")))
    if strides == "transposed":
        ids = ids.t().contiguous().t()
    elif strides == "expanded" and batch:
        ids = ids[:1].expand(batch, length)
        mask = None if mask is None else mask[:, :1].expand(batch, length) if length else mask
    elif strides == "offset":
        ids = torch.nn.functional.pad(ids, (1, 2, 3, 0))[3:, 1 : 1 + length]
    return ids, mask, modalities


@built
@settings(max_examples=80, deadline=None)
@given(batches())
def test_is_the_plan_in_torch(batch) -> None:
    assert_is_plan_in_torch(*batch)


@built
@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    assert_is_plan_in_torch(CASES[name].ids(), None, 2)


@built
def test_threads_do_not_matter() -> None:
    ids = torch.randint(-1, 3, (5000, 13), generator=torch.Generator().manual_seed(0))
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(torch.ops.vlmo_kernels_cpu.plan(ids, None, 3))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@built
def test_layouts_use_it(monkeypatch) -> None:
    ids = CASES["mixed_kinds"].ids()
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.8
    names = ("text", "image")
    with monkeypatch.context() as patch:
        patch.setattr(planning, "plan_in_torch", None)  # would raise
        ours = vk.ModalityLayout.from_modality_ids(ids, mask.double(), modalities=names)
    monkeypatch.setattr(compiled, "cpu_ops", lambda: None)
    expected = vk.ModalityLayout.from_modality_ids(ids, mask.double(), modalities=names)
    for name in TABLES:
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name


@built
def test_more_modalities_than_it_takes_go_through_torch() -> None:
    names = tuple(f"m{i}" for i in range(20))
    layout = vk.ModalityLayout.from_modality_ids(torch.arange(20).view(2, 10), modalities=names)
    assert layout.cu_seqlens.tolist() == [0, 10, 20]
    with pytest.raises(RuntimeError, match="`modalities` must be 1 to 15, got 20"):
        torch.ops.vlmo_kernels_cpu.plan(torch.zeros(1, 1).long(), None, 20)


@built
@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(2, 2), None, "must be int32 or int64"),
        (torch.zeros(2).long(), None, r"must be \[B, N\], got 1"),
        (torch.zeros(2, 2).long(), torch.ones(2, 3).bool(), "`mask` must be bool, of the shape"),
        (torch.zeros(2, 2).long(), torch.ones(2, 2), "`mask` must be bool, of the shape"),
        (torch.zeros(1, 1).long().expand(2**17, 2**17), None, "must be below 2"),
    ],
)
def test_wrong_arguments_are_errors(ids, mask, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vlmo_kernels_cpu.plan(ids, mask, 2)


@built
def test_a_plan_is_one_op_for_the_compiler() -> None:
    ids = CASES["pair"].ids()
    torch.library.opcheck(torch.ops.vlmo_kernels.plan.default, (ids, None, 2))
    torch.library.opcheck(torch.ops.vlmo_kernels.plan.default, (ids, ids >= 0, 2))


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_nvcc_spills_nothing(arch: int, tmp_path: Path) -> None:
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        command = [NVCC, "-std=c++17", "-O3", f"-I{ROOT}/csrc/include", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command += ["-Xptxas", "-v", "-c", source, "-o", tmp_path / "out.o"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert said and set(said) == {("0", "0", "0")}, done.stderr
