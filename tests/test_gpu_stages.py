"""The stages of `make gpu`, tried without a GPU and with nothing but torch, Triton, numpy and pytest importable.

Whoever has a GPU for half an hour must not lose it to a slip: the stages run on the CPU on the smallest input, and
the bodies of the GPU tests in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What an extra installs, or a test elsewhere needs; none of it is on a bare GPU machine.
ABSENT = (
    "typer", "rich", "tqdm", "PIL", "matplotlib", "hypothesis", "expecttest", "tokenizers", "safetensors",
    "torchscale", "timm", "fairscale", "xformers", "torchvision", "pytest_benchmark",
)  # fmt: skip
HIDE = f"""
import sys
from importlib.machinery import PathFinder
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT!r} else super().find_spec(name, path, target)
sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


def bare(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python as on a bare machine, its children too."""
    (tmp_path / "bare").mkdir(exist_ok=True)
    (tmp_path / "bare" / "sitecustomize.py").write_text(HIDE)
    path = os.pathsep.join([str(tmp_path / "bare"), str(ROOT), str(ROOT / "python")])
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env |= {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=580)


def passed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    return done.stdout


def test_the_bare_machine_is_bare(tmp_path: Path) -> None:
    program = f"import importlib.util as u; assert not any(u.find_spec(n) for n in {ABSENT!r}); import torch, numpy"
    passed(bare(tmp_path, "-c", program))


def test_every_gpu_test_is_collected(tmp_path: Path) -> None:
    """By the correctness stage itself, in two shards that share the tests between them."""
    out = tmp_path / "out"
    arguments = ("correctness", "--device", "cpu", "--processes", "2", "--out", str(out))
    found = passed(bare(tmp_path, "benchmarks/gpu.py", *arguments))
    counts = [int(line.split("exit 0: ")[1].split("/")[0]) for line in found.splitlines() if line.startswith("shard")]
    assert len(counts) == 2 and abs(counts[0] - counts[1]) <= 1 and sum(counts) > 70, found
    assert "compute-sanitizer: not run" in (out / "correctness.txt").read_text()


def test_without_a_gpu_a_stage_says_so(tmp_path: Path) -> None:
    done = bare(tmp_path, "benchmarks/gpu.py", "tune", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "there must be a GPU" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage, files", [("peers", ("block", "ffn", "attention")), ("bench", ("launches",))])
def test_a_stage_writes_rows(stage: str, files: tuple[str, ...], tmp_path: Path) -> None:
    # torch.compile is tried by the tests of the suites; here it would take minutes
    variables = {"TRITON_INTERPRET": "1"} if stage == "bench" else {"TORCHDYNAMO_DISABLE": "1"}
    passed(bare(tmp_path, "benchmarks/gpu.py", stage, "--device", "cpu", "--out", str(tmp_path), **variables))
    for name in files:
        rows = json.loads((tmp_path / f"{name}.json").read_text())
        assert any(row["contestant"] == "ours" for row in rows)
        assert all(row["versions"] and row["device"] and "commit" in row for row in rows)


@pytest.mark.slow
def test_the_tune_stage_writes_a_table(tmp_path: Path) -> None:
    passed(
        bare(tmp_path, "benchmarks/gpu.py", "tune", "--device", "cpu", "--out", str(tmp_path), TRITON_INTERPRET="1")
    )
    assert json.loads((tmp_path / "tuning" / "interpreter.json").read_text())["format"] == 1


@pytest.mark.slow
def test_bodies_of_the_gpu_tests_pass_in_the_interpreter(tmp_path: Path) -> None:
    """All but those that need CUDA itself; of the op tests one of each kind."""
    chosen = "not refuses and (test_wrappers or test_determinism or (as_close and bfloat16 and (routed_norm-layer or "
    chosen += "routed_linear-plain or routed_ffn-swiglu or shared_attention-prefix_bias)))"
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu", "-k", chosen)
    found = passed(bare(tmp_path, *command, TRITON_INTERPRET="1", VLMO_TEST_DEVICE="cpu"))
    assert "passed" in found and "skipped" not in found
