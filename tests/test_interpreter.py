"""The interpreter tests, each file in a process of its own with TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.name for path in (ROOT / "tests" / "interpreter").glob("test_*.py"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", FILES)
def test_passes_without_a_skip(name: str, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    # the options of the run around this one (workers, coverage) are not for the process within
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        [*command, f"tests/interpreter/{name}"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None and int(suite.get("tests", "0")) > 0
    assert int(suite.get("skipped", "0")) == 0, "the interpreter runs every test, so none may be skipped"
