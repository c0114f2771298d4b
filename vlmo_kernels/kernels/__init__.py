"""Triton kernels, imported lazily: one module an op, with the same `forward` and `backward` as its reference."""
