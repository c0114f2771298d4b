"""The CPU fast path: oneDNN through torch's own ops, on packed rows. No padding, fused epilogues."""
