"""The benchmark core: contestants, correctness gate, interleaved timing, JSON rows."""
