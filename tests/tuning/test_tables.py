"""Tables of measured configurations: format, lookup, the user's cache, and what `explain` says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vlmo_kernels.tuning import tables, tune
from vlmo_kernels.tuning.tables import Problem

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.device("cuda", 0)  # never touched: the architecture is given
PROBLEM = Problem("gemm", torch.bfloat16, (13888, 3072, 768))


def table(*entries: dict) -> dict:
    return dict(format=1, arch="sm_90", device="test", versions={}, commit=None, entries=list(entries))


def entry(config, sizes=(16384, 4096, 1024), kernel="gemm") -> dict:
    return dict(kernel=kernel, dtype="bfloat16", sizes=list(sizes), config=config, ms=1.0, heuristic_ms=2.0)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A user's cache and a folder of shipped tables, both empty, on an sm_90."""
    monkeypatch.setenv("VLMO_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tables, "architecture", lambda index: "sm_90")
    tables._entries.cache_clear()
    yield tables.user_file("sm_90"), tmp_path / "shipped" / "sm_90.json"
    tables._entries.cache_clear()


def test_without_tables_the_heuristics_choose(folders) -> None:
    assert tables.find(PROBLEM, GPU) is None
    assert tables.source(PROBLEM, GPU) == "heuristics"


def test_the_users_cache_comes_before_the_shipped_table(folders) -> None:
    user, shipped = folders
    tables.write(shipped, table(entry([1]), entry("cublas", kernel="weight grad")))
    assert tables.find(PROBLEM, GPU).config == (1,)
    assert tables.source(PROBLEM, GPU).startswith("shipped table")
    tables.write(user, table(entry([2, None])))
    assert tables.find(PROBLEM, GPU).config == (2, None)
    assert tables.source(PROBLEM, GPU) == f"user cache {user}"
    assert tables.find(Problem("weight grad", torch.bfloat16, (9000, 4096, 1024)), GPU).config == tables.CUBLAS


@pytest.mark.parametrize(
    "other",
    [
        Problem("gemm gated", *PROBLEM[1:]),
        Problem("gemm", torch.float16, PROBLEM.sizes),
        Problem("gemm", torch.bfloat16, (8192, 3072, 768)),
    ],
)
def test_another_launch_is_not_served(folders, other: Problem) -> None:
    tables.write(folders[0], table(entry([1])))
    assert tables.find(other, GPU) is None


def test_buckets() -> None:
    assert tables.buckets((0, 1, 2, 3, 768, 1024, 1025)) == (1, 1, 2, 4, 1024, 1024, 2048)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps(table() | {"format": 2}),
        json.dumps(table(entry(7))),
        json.dumps(table({"kernel": 1})),
    ],
)
def test_a_broken_cache_warns_and_is_left(folders, text: str) -> None:
    user, shipped = folders
    tables.write(shipped, table(entry([1])))
    user.parent.mkdir(parents=True)
    user.write_text(text)
    with pytest.warns(UserWarning, match="must be a table of format 1.*heuristics are used"):
        assert tables.find(PROBLEM, GPU).config == (1,)


@pytest.mark.parametrize("error", (PermissionError("denied"), RuntimeError("Could not determine home directory.")))
def test_a_cache_out_of_reach_warns_and_is_left(folders, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container often runs under a user without a home, or with one that it may not read."""
    tables.write(folders[1], table(entry([1])))

    def user_file(arch: str) -> Path:
        raise error

    monkeypatch.setattr(tables, "user_file", user_file)
    with pytest.warns(UserWarning, match=f"{error}.*VLMO_KERNELS_CACHE"):
        assert tables.find(PROBLEM, GPU).config == (1,)


def test_a_table_from_before_descriptors_is_read(folders) -> None:
    """A field that `Config` gained since has its default."""
    pytest.importorskip("triton")
    from vlmo_kernels.kernels.gemm import Config

    old, new = [128, 128, 64, 8, 3, 2, 128], [128, 128, 64, 8, 3, 2, 128, True]
    tables.write(folders[0], table(entry(old), entry(new, kernel="input grad")))
    found = [Config(*tables.find(Problem(kernel, *PROBLEM[1:]), GPU).config) for kernel in ("gemm", "input grad")]
    assert [c.tma for c in found] == [False, True] and found[0] == found[1]._replace(tma=False)


def test_a_table_is_replaced_at_once(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails leaves the old table and no half of a new one under its name."""
    user, _ = folders
    tables.write(user, table(entry([1])))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError):
            tables.write(user, table(entry([2])))
    assert tables.read(user)["entries"][0]["config"] == [1]


def test_tuning_again_races_the_heuristics(folders) -> None:
    """An entry of an earlier run in their place would be no faster than itself, and be dropped."""
    tables.write(folders[0], table(entry([1])))
    found, raced = torch.ones(3), []

    def run() -> tuple[torch.Tensor]:
        choice = tables.find(PROBLEM, GPU)
        raced.append(choice and choice.config)
        return (found.to(PROBLEM.dtype),)

    job = tune.Job(PROBLEM, run, lambda dtype: (found.to(dtype),), ((1,),), {}, 1.0)
    tune.settle(job, "cpu", time.perf_counter() + 60)
    assert set(raced) == {None, (1,)}


def test_forced_choices_end_with_their_scope() -> None:
    cpu = torch.device("cpu")
    with tables.forced({"gemm": (1,)}):
        with tables.forced({"gemm": tables.CUBLAS}):
            assert tables.find(PROBLEM, cpu).config == tables.CUBLAS
        assert tables.find(PROBLEM, cpu).config == (1,)
    assert tables.find(PROBLEM, cpu) is None


def test_every_shipped_table_is_one() -> None:
    """None is shipped before it has been measured."""
    for path in tables.SHIPPED.glob("*.json"):
        found = tables.read(path)
        assert found["arch"] == path.stem and found["device"] and found["versions"]


def interpreted(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"TRITON_INTERPRET": "1"} | variables
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


TINY = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("typer", "rich", "tqdm", "matplotlib", "PIL", "vlmo"):
            raise ImportError(f"{name} must not be needed")
sys.meta_path.insert(0, Refuse())
import vlmo_kernels.tuning.tune as tune
from vlmo_kernels.tuning import tables, tune
keep = {"gemm", "weight grad summed", "attention short bias"}
every = tune.jobs
tune.jobs = lambda *a: [j for j in every(*a) if j.problem.kernel in keep][1:]
heads, show = [], tune.table
tune.table = lambda title, columns, lines: (heads.extend(columns), show(title, columns, lines))
assert tune.run("tiny", 1, "fp32", 60.0, None, "cpu") == 0
assert heads[0] == "launch" and all(heads), heads
for e in tables.read(tables.user_file("interpreter"))["entries"]:
    assert e["kernel"] in keep and e["ms"] < e["heuristic_ms"]
"""


def test_the_tuner_runs_with_torch_and_triton_alone(tmp_path: Path) -> None:
    """In the interpreter: gate, race and table. What it measures there means nothing and is written elsewhere."""
    pytest.importorskip("triton")
    done = interpreted(TINY, VLMO_KERNELS_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "interpreter.json").exists()


EXPLAIN = """
import torch, vlmo_kernels as vk
layout = vk.ModalityLayout.from_lengths({"text": [3], "image": 4})
x, w = torch.ones(7, 8), [torch.ones(6, 8)] * 2
found = vk.explain("routed_linear", x, w, None, layout, impl="triton")
assert list(found.configurations) == [
    "gemm float32 8x8x8", "input grad float32 8x8x8", "weight grad float32 8x8x8"], found
assert set(found.configurations.values()) == {"heuristics of the interpreter"}
assert "configuration of gemm float32 8x8x8: heuristics of the interpreter" in str(found)
w1, w2 = [torch.ones(20, 8)] * 2, [torch.ones(8, 20)] * 2
assert len(vk.explain("routed_ffn", x, w1, None, w2, None, layout, impl="triton").configurations) == 6
qkv = torch.ones(7, 3, 2, 4)
assert len(vk.explain("shared_attention", qkv, None, None, layout, impl="triton").configurations) == 4
assert not vk.explain("routed_linear", x, w, None, layout).configurations  # runs on the CPU path
"""


def test_explain_names_the_source_of_configurations() -> None:
    pytest.importorskip("triton")
    done = interpreted(EXPLAIN)
    assert done.returncode == 0, done.stderr
