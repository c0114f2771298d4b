"""pytest-benchmark entry point of the suite `attention`: `pytest benchmarks/bench_attention.py`; see README.md."""

import pytest
from common import contestants_of, name_of, timed


@pytest.mark.parametrize("entry", contestants_of("attention"), ids=name_of)
def test_attention(benchmark, entry):
    timed(benchmark, "attention", entry)
