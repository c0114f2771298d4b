"""The codegen audit of every shipped kernel, and that the audit catches what it is for. No GPU needed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def compiled(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python in a process that compiles, whatever this one does; `path` comes before what is installed."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(part for part in (path, str(ROOT), env.get("PYTHONPATH", "")) if part)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1100)


@pytest.mark.parametrize("arch", ["90", pytest.param("100", marks=pytest.mark.slow)])
def test_one_configuration_of_every_kernel(arch: str) -> None:
    """All configurations take minutes: `test_every_configuration` and `make audit`."""
    done = compiled("-m", "vlmo_kernels.audit", "--arch", arch, "--brief")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    for kernel in ("gemm fc1", "input grad", "weight grad", "routed_norm forward", "attention fwd", "gather_rows"):
        assert f"\n{kernel}" in done.stdout, kernel


@pytest.mark.slow
def test_every_configuration() -> None:
    """Of the GEMMs and attention on sm_90, where most is at stake; `make audit` does all architectures."""
    modules = [f"vlmo_kernels.kernels.{name}" for name in ("gemm_audit", "attention_audit")]
    done = compiled("-m", "vlmo_kernels.audit", "--arch", "90", "--module", *modules)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


@pytest.mark.slow
def test_the_newest_triton(tmp_path: Path) -> None:
    """Another Triton compiles other code: the newest the package index has, beside the one that is installed."""
    target = tmp_path / "newest"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), "triton>=3.7"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"a newer Triton could not be installed: {done.stderr[-2000:]}"
    done = compiled("-m", "vlmo_kernels.audit", "--arch", "90", "--brief", path=str(target))
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


@pytest.mark.parametrize("arch", [90, 100])
def test_bad_kernels_are_caught(arch: int) -> None:
    done = compiled(
        "-c",
        "import json; from vlmo_kernels.audit import audit; "
        f"print(json.dumps([row._asdict() for row in audit(['tests.codegen.bad_kernels'], [{arch}])]))",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    wide = {90: "HGMMA", 100: "UTCHMMA"}[arch]
    for name, breach in {
        "spills": "bytes spilled, 0 allowed",
        "may spill": None,
        "may spill without a reason": "an exception without a reason",
        "does not spill": None,
        "serialised": "wgmma serialised (C75" if arch == 90 else None,
        "not serialised": None,
        "tile too small for wgmma": f"16-bit tl.dot with 0 {wide} and",
        "small tile on purpose": None,
        "small tile without a reason": "an exception without a reason",
        "too much shared memory": f"bytes of shared memory, sm_{arch} has 232448",
        "one fits an SM": "bytes of shared memory, 115712 for 2 blocks an SM",
        "two fit an SM": None,
        "too many registers for two": "registers, 128 for 2 blocks an SM",
        "gathers": "nothing is loaded ahead in a main loop of 3 stages",
        "gathers on purpose": None,
        "TMA without a pipeline": "nothing is loaded ahead in a main loop of 3 stages",
        "TMA": None,
        "does not compile": "does not compile: CompilationError",
    }.items():
        if breach is None:
            assert rows.pop(name)["breach"] == "", name
        else:
            assert breach in rows.pop(name)["breach"], name
    assert not rows


def test_a_breach_is_the_exit_status() -> None:
    done = compiled("-m", "vlmo_kernels.audit", "--arch", "90", "--module", "tests.codegen.bad_kernels")
    assert done.returncode == 1
    assert "BREACH: " in done.stdout and "18 compiled, 11 in breach of a limit" in done.stdout
