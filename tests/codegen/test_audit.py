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


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that compiles, whatever this one does."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1100)


@pytest.mark.parametrize(
    "arch", ["90", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("80", "100", "120"))]
)
def test_one_configuration_of_every_kernel(arch: str) -> None:
    """All configurations take minutes an architecture: `make audit`."""
    done = compiled("-m", "vlmo_kernels.audit", "--arch", arch, "--brief")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "routed_norm forward" in done.stdout


def test_bad_kernels_are_caught() -> None:
    done = compiled(
        "-c",
        "import json; from vlmo_kernels.audit import audit; "
        "print(json.dumps([row._asdict() for row in audit(['tests.codegen.bad_kernels'], [90])]))",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    for name, breach in {
        "spills": "bytes spilled, 0 allowed",
        "may spill": None,
        "may spill without a reason": "without a reason",
        "does not spill": None,
        "serialised": "wgmma serialised (C75",
        "not serialised": None,
        "tile too small for wgmma": "without a warp-group matrix instruction",
        "small tile on purpose": None,
        "too much shared memory": "bytes of shared memory, sm_90 has 232448",
        "does not compile": "does not compile: CompilationError",
    }.items():
        if breach is None:
            assert rows.pop(name)["breach"] == ""
        else:
            assert breach in rows.pop(name)["breach"], name
    assert not rows


def test_a_breach_is_the_exit_status() -> None:
    done = compiled("-m", "vlmo_kernels.audit", "--arch", "90", "--module", "tests.codegen.bad_kernels")
    assert done.returncode == 1
    assert "BREACH: " in done.stdout and "10 compiled, 6 in breach of a limit" in done.stdout
