"""The seed of every test; order and grouping, for runs on several processes (pytest-xdist)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

# Files whose module fixtures cost more than their tests: one process runs all of such a file.
SHARED = {"test_demo.py", "test_cli.py", "test_retrieval.py", "test_tasks.py", "test_cli_tasks.py", "test_vlmo_base.py"}
# These take minutes; begun last, one process would run them while the others wait.
FIRST = ("test_interpreter.py", "test_distributed.py", "test_audit.py", "test_gpu_stages.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if Path(item.path).name in SHARED:
                item.add_marker(pytest.mark.xdist_group(Path(item.path).name))
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(autouse=True)
def same_numbers_in_every_run() -> None:
    """What a test draws without a seed of its own."""
    torch.manual_seed(0)
