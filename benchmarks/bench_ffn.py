"""pytest-benchmark entry point of the suite `ffn`: `pytest benchmarks/bench_ffn.py`; see README.md."""

import pytest
from common import contestants_of, name_of, timed


@pytest.mark.parametrize("entry", contestants_of("ffn"), ids=name_of)
def test_ffn(benchmark, entry):
    timed(benchmark, "ffn", entry)
