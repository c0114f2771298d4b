"""The entry points of pytest-benchmark: every contestant of every suite runs and is right, on the small case."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_every_entry_point_runs() -> None:
    files = sorted(str(path) for path in (ROOT / "benchmarks").glob("bench_*.py"))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "BENCH_"))}
    # what torch.compile makes of the contestants is tried by the tests of the suites; here it would take minutes
    env |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", *files]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert len(files) == 4 and done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
