"""The CPU fast path on packed rows, no padding: oneDNN through torch's own ops, and compiled kernels (csrc)."""
