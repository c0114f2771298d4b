"""Activations and their derivatives as Triton device functions, on fp32 tiles of any shape."""

from __future__ import annotations

import triton
import triton.language as tl

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}


@triton.jit
def _sigmoids(x):
    """`sigmoid(x)` and `1 - sigmoid(x)`, both without cancellation or overflow."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _normal(x, EXACT: tl.constexpr):
    """Normal distribution function of `x`, and `exp(-x^2 / 2)`.

    EXACT uses libdevice's erf (32 instructions an element) and is meant for fp32 outputs. Otherwise Abramowitz
    and Stegun 7.1.26 in its erfc form, with the 1/2 and the 1/sqrt(2) folded into the coefficients: 15
    instructions, absolute error of x * Phi(x) 4.2e-7, far below half a unit in the last place of bf16 or fp16.
    The erfc form keeps the left tail free of cancellation.
    """
    density = tl.exp2(x * x * -0.7213475204444817)  # log2(e) / 2
    if EXACT:
        phi = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
    else:
        root = tl.math.rsqrt(1.0 + 0.23164189 * tl.abs(x))  # 0.3275911 / sqrt(2); one MUFU, a division is two
        t = root * root
        tail = 0.5307027145 * t - 0.7265760135
        tail = tail * t + 0.7107068705
        tail = tail * t - 0.142248368
        tail = tail * t + 0.127414796
        tail = tail * t * density  # Phi(-|x|)
        phi = tl.where(x < 0, tail, 1.0 - tail)
    return phi, density


@triton.jit
def activate(x, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Plain activation KIND of fp32 `x`; "none" is the identity. GELU: Hendrycks and Gimpel 2016."""
    if KIND == "gelu":
        phi, density = _normal(x, EXACT)
        return x * phi
    elif KIND == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): no tanh, no cancellation.
        return x * _sigmoid(x * (1.5957691216057308 + 0.0713548162726 * x * x))
    elif KIND == "relu":
        return tl.where(x < 0, 0.0, x)  # keeps NaN, as torch does
    elif KIND == "silu":
        return x * _sigmoid(x)
    else:
        tl.static_assert(KIND == "none")
        return x


@triton.jit
def activate_with_derivative(x, KIND: tl.constexpr, EXACT: tl.constexpr):
    """`activate(x)` and its derivative; they share their transcendentals."""
    if KIND == "gelu":
        phi, density = _normal(x, EXACT)
        return x * phi, phi + x * (0.3989422804014327 * density)
    elif KIND == "gelu_tanh":
        square = x * x
        s, rest = _sigmoids(x * (1.5957691216057308 + 0.0713548162726 * square))
        slope = 1.5957691216057308 + 0.2140644488178 * square
        return x * s, s + x * s * rest * slope
    elif KIND == "relu":
        return tl.where(x < 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(KIND == "silu")
        s, rest = _sigmoids(x)
        return x * s, s * (1.0 + x * rest)
