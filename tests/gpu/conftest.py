"""GPU tests are marked `gpu` and run by `make gpu`; elsewhere they are deselected, not skipped."""

from __future__ import annotations

import pathlib

import pytest

HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in pathlib.Path(item.fspath).parents:
            item.add_marker(pytest.mark.gpu)
