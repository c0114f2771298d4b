// Activations of dense layers and their derivatives, on vectors. What is not `precise` is meant for 16-bit results, of
// whose rounding its error is a tenth.
#pragma once

#include "dense.h"
#include "vec.h"

namespace vlmo_kernels {
namespace VLMO_LEVEL {

static inline vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }
static inline vf vmin(vf a, vf b) { return -vmax(-a, -b); }
// False for NaN.
static inline Mask at_most_zero(vf x) {
#if VLMO_AVX512
  return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_LE_OQ);
#else
  return x <= 0.0f;
#endif
}
static inline Mask negative(vf x) { return less((vi)x, 0); }

// 1 / x for x of ordinary size, within a rounding or two, or else within 2^-14 of it.
template <bool precise>
static inline vf reciprocal(vf x) {
#if VLMO_AVX512
  const vf r = (vf)_mm512_rcp14_ps((__m512)x);  // a step of Newton's is a third of a division
  return precise ? fma(r, fma(-x, r, set1(1.0f)), r) : r;
#else
  return 1.0f / x;
#endif
}

// Distribution function and density of the standard normal. P(-t) = e^(-t^2/2) q(u) with u = 1 / (1 + t/4), t >= 0.
// The precise polynomial is within 1.9e-9 of P (least maximum of the absolute error), a thirtieth of a rounding of
// 1 - P; the other one within 2.1e-5 of it relative to P itself, for t up to 6.
template <bool precise>
static inline void normal(vf x, vf& below, vf& density) {
  const vf t = vmin(absolute(x), set1(64.0f)), u = reciprocal<precise>(fma(t, set1(0.25f), set1(1.0f)));
  const vf e = exp_of<precise>(t * t * -0.5f);
  vf q;
  if (precise) {
    q = set1(-0.0864521142f);
    q = fma(q, u, set1(0.315462328f));
    q = fma(q, u, set1(-0.21194011f));
    q = fma(q, u, set1(0.219669522f));
    q = fma(q, u, set1(0.0632214434f));
    q = fma(q, u, set1(0.0994785509f));
    q = fma(q, u, set1(0.100560377f));
  } else {
    q = set1(0.244188209f);
    q = fma(q, u, set1(-0.109379554f));
    q = fma(q, u, set1(0.184208106f));
    q = fma(q, u, set1(0.0796222053f));
    q = fma(q, u, set1(0.101371719f));
  }
  const vf tail = q * u * e;
  below = select(negative(x), tail, 1.0f - tail);
  density = e * 0.398942280f;
}

// The logistic function and what it lacks to 1, each without cancellation.
template <bool precise>
static inline void logistic(vf x, vf& value, vf& rest) {
  const vf e = exp_of<precise>((vf)((vi)x | (int32_t)0x80000000)), high = reciprocal<precise>(e + 1.0f), low = e * high;
  value = select(negative(x), low, high);
  rest = select(negative(x), high, low);
}

// The value, and with `derivative` its slope.
template <Activation kind, bool derivative, bool precise>
static inline vf activate(vf x, vf& slope) {
  if (kind == GELU) {
    vf below, density;
    normal<precise>(x, below, density);
    if (derivative) slope = fma(x, density, below);
    return x * below;
  }
  if (kind == GELU_TANH) {  // 0.5 (1 + tanh v) is the logistic function of 2 v
    const vf square = x * x;
    vf s, rest;
    logistic<precise>(x * fma(square, set1(2 * 0.0356774081f), set1(2 * 0.797884561f)), s, rest);
    if (derivative) slope = fma(x * s * rest, fma(square, set1(6 * 0.0356774081f), set1(2 * 0.797884561f)), s);
    return x * s;
  }
  if (kind == SILU) {
    vf s, rest;
    logistic<precise>(x, s, rest);
    if (derivative) slope = s * fma(x, rest, set1(1.0f));
    return x * s;
  }
  if (kind == RELU) {
    if (derivative) slope = select(at_most_zero(x), vf{}, set1(1.0f));
    return vmax(vf{}, x);
  }
  slope = set1(1.0f);
  return x;
}

// Calls body with the activation as a type.
template <Activation A>
struct Kind {
  static constexpr Activation value = A;
};
template <class Body>
static inline void with_activation(Activation kind, Body body) {
  switch (kind) {
    case GELU: return body(Kind<GELU>());
    case GELU_TANH: return body(Kind<GELU_TANH>());
    case RELU: return body(Kind<RELU>());
    case SILU: return body(Kind<SILU>());
    case NO_ACTIVATION: return body(Kind<NO_ACTIVATION>());
  }
}

}  // namespace VLMO_LEVEL
}  // namespace vlmo_kernels
