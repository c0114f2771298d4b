"""pytest-benchmark entry point of the suite `block`: `pytest benchmarks/bench_block.py`; see README.md."""

import pytest
from common import contestants_of, name_of, timed


@pytest.mark.parametrize("entry", contestants_of("block"), ids=name_of)
def test_block(benchmark, entry):
    timed(benchmark, "block", entry)
