"""README and docs: their results are what the result files say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vlmo_kernels.ops.routed_ffn import GATED, PLAIN

ROOT = Path(__file__).resolve().parents[2]


def test_every_activation_is_listed():
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `routed_ffn`")]
    named = row.partition(": ")[2].partition(";")[0].split(", ")
    assert set(named) == {*PLAIN, *GATED}


def test_results_sections_are_generated():
    command = [sys.executable, ROOT / "benchmarks" / "report.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
