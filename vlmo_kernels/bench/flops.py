"""Useful floating-point operations: what a case needs, not what a contestant spends on it.

Real tokens count and padding does not, so all contestants of a case have one number, and a rate says how fast the job
gets done. Only products are counted; norms, softmax, activations and bias gradients are not.

    dense layer, [T, K] by [K, N]   forward 2 T K N; backward twice that: gradients of input and of weight
    attention over samples of n_i   forward 4 D sum n_i^2, that is Q K^T and P V; backward 2.5 times that: Q K^T once
                                    more, and the gradients of V, P, Q and K
"""

from __future__ import annotations

from .cases import Case

_DENSE_BACKWARD, _ATTENTION_BACKWARD = 2.0, 2.5


def useful(suite: str, case: Case, pass_: str) -> float:
    """FLOPs of one call in a suite; the pass `training` is forward and backward."""
    dense = 2.0 * case.tokens * _dense_weights(suite, case)
    attention = 4.0 * case.dim * sum(n * n for n in case.lengths) if suite in ("block", "attention") else 0.0
    if pass_ == "forward":
        return dense + attention
    return (1 + _DENSE_BACKWARD) * dense + (1 + _ATTENTION_BACKWARD) * attention


def _dense_weights(suite: str, case: Case) -> int:
    """Elements of the weight matrices that a token meets."""
    ffn, projections = 2 * case.dim * case.hidden, 4 * case.dim**2  # qkv and the output's
    return {"block": ffn + projections, "ffn": ffn, "attention": 0}[suite]
