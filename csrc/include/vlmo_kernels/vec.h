// Vectors of the widest kind an instruction set has, and the number formats that memory holds.
//
// This header and those that build on it are compiled once for every instruction set, by a file of csrc/cpu that
// defines VLMO_LEVEL. All they define lies in the namespace of that name, and they use no standard library templates:
// otherwise the linker might keep the one copy that a machine cannot run.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifndef VLMO_LEVEL
#define VLMO_LEVEL portable
#endif
#define VLMO_JOIN_(a, b) a##b
#define VLMO_JOIN(a, b) VLMO_JOIN_(a, b)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"          // vectors are passed between inlined functions only
#pragma GCC diagnostic ignored "-Wuninitialized"  // the undefined operands inside GCC's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vlmo_kernels {
namespace VLMO_LEVEL {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define VLMO_AVX512 1
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VLMO_AVX2 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));

template <class A>
static inline A min_of(A a, A b) {
  return b < a ? b : a;
}
template <class A>
static inline A max_of(A a, A b) {
  return a < b ? b : a;
}
static inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

template <class V>
static inline V load_raw(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
static inline uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
static inline float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

// ------------------------------------------------------------------ scalars

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
static inline float to_float(fp16 x) {
#if VLMO_AVX512 || VLMO_AVX2
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Shifted into place the exponent is 112 too small; the product also makes denormals right.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
#endif
}

template <class T>
static inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = bits_of(x);
  if (x != x) return bf16{uint16_t(u >> 16 | 0x40)};  // rounding could carry a NaN into another number
  return bf16{uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
#if VLMO_AVX512 || VLMO_AVX2
  return fp16{uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return fp16{uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return fp16{uint16_t(sign | 0x7c00)};
  if (magnitude < 0x38800000)  // a denormal: the sum rounds at its last place
    return fp16{uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)))};
  return fp16{uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13)};
#endif
}

// ------------------------------------------------------------------ arithmetic

static inline vf set1(float x) { return x - vf{}; }
static inline vf fma(vf a, vf b, vf c) {
#if VLMO_AVX512
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VLMO_AVX2
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The larger; the second if either is NaN.
static inline vf vmax(vf a, vf b) {
#if VLMO_AVX512
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif VLMO_AVX2
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

#if VLMO_AVX512
typedef __mmask16 Mask;
static inline Mask less(vi a, int32_t b) { return _mm512_cmplt_epi32_mask((__m512i)a, _mm512_set1_epi32(b)); }
static inline vf select(Mask m, vf a, vf b) { return (vf)_mm512_mask_blend_ps(m, (__m512)b, (__m512)a); }
#else
typedef vi Mask;
static inline Mask less(vi a, int32_t b) { return a < b; }
static inline vf select(Mask m, vf a, vf b) { return m ? a : b; }
#endif

// Halves are combined until one number is left: the same order everywhere.
static inline float sum_of(vf v) {
#if VLMO_AVX512
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total[W];
  __builtin_memcpy(total, &v, sizeof v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) total[i] += total[i + half];
  return total[0];
#endif
}
static inline float max_of(vf v) {
#if VLMO_AVX512
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best[W];
  __builtin_memcpy(best, &v, sizeof v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) best[i] = max_of(best[i], best[i + half]);
  return best[0];
#endif
}

// e^x for x <= 0 (and a little above), 0 below -87.3; NaN stays NaN. 2^f on [-1/2, 1/2] is a polynomial (least
// maximum of the relative error, which is 2e-9 in degree 6, and 3e-6 in degree 4, enough for 16-bit results).
template <bool precise>
static inline vf exp_of(vf x) {
  vf t = x * 1.44269504088896341f;
#if VLMO_AVX512
  // What underflows is masked off, because the processor would take 150 cycles to make a denormal of it.
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const vf n = (vf)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Mask zero = t < -126.0f, bad = t != t;
  t = vmax(set1(-126.0f), t);
  const vf magic = set1(12582912.0f), shifted = t + magic, n = shifted - magic;
#endif
  vf f = t - n, p;
  if (precise) {  // t has the rounding of a large number; x less n ln 2, in two pieces, has not
    f = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x)) * 1.44269504088896341f;
    p = set1(1.53533591e-4f);
    p = fma(p, f, set1(1.33988754e-3f));
    p = fma(p, f, set1(9.61843738e-3f));
    p = fma(p, f, set1(5.55033247e-2f));
    p = fma(p, f, set1(2.40226479e-1f));
    p = fma(p, f, set1(6.93147203e-1f));
  } else {
    p = set1(9.58285e-3f);
    p = fma(p, f, set1(5.590643e-2f));
    p = fma(p, f, set1(2.4024099e-1f));
    p = fma(p, f, set1(6.9312419e-1f));
  }
  p = fma(p, f, set1(1.0f));
#if VLMO_AVX512
  return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  const vf scaled = (vf)((vi)p + (((vi)shifted - (vi)magic) << 23));
  return select(bad, x, select(zero, vf{}, scaled));
#endif
}

// ------------------------------------------------------------------ memory

static inline vf load(const float* p) { return load_raw<vf>(p); }
static inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

#if VLMO_AVX512
static inline vf load(const bf16* p) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
static inline vf load(const fp16* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline __m256i bf16_bits(vf v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh((__m512)v);
#else
  const __m512i u = (__m512i)v, one = _mm512_set1_epi32(1);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(u, 16), one);
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, even), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i r = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
#endif
}
static inline void store(bf16* p, vf v) { _mm256_storeu_si256((__m256i*)p, bf16_bits(v)); }
static inline void store(fp16* p, vf v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline __mmask16 lanes_mask(int from, int to) { return __mmask16((1u << to) - (1u << from)); }
// Lanes `from` to `to` of p, 0 elsewhere; nothing outside them is touched.
static inline vf load_lanes(const float* p, int from, int to) {
  return (vf)_mm512_maskz_loadu_ps(lanes_mask(from, to), p);
}
static inline vf load_lanes(const bf16* p, int from, int to) {
  const __m256i u = _mm256_maskz_loadu_epi16(lanes_mask(from, to), p);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(u), 16);
}
static inline vf load_lanes(const fp16* p, int from, int to) {
  return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_mask(from, to), p));
}
static inline void store_lanes(float* p, vf v, int from, int to) {
  _mm512_mask_storeu_ps(p, lanes_mask(from, to), (__m512)v);
}
static inline void store_lanes(bf16* p, vf v, int from, int to) {
  _mm256_mask_storeu_epi16(p, lanes_mask(from, to), bf16_bits(v));
}
static inline void store_lanes(fp16* p, vf v, int from, int to) {
  const __m256i u = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(p, lanes_mask(from, to), u);
}
#else
#if VLMO_AVX2
static inline vf load(const bf16* p) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
static inline vf load(const fp16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void store(fp16* p, vf v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
static inline vf load(const bf16* p) { return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
static inline vf load(const fp16* p) { return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
static inline void store(fp16* p, vf v) {
  for (int i = 0; i < W; i++) p[i] = from_float<fp16>(v[i]);
}
#endif
static inline void store(bf16* p, vf v) {
  const vu u = (vu)v;
  const vu r = ((vu)(v == v) & (u + 0x7fff + (u >> 16 & 1))) | ((vu)(v != v) & (u | 0x400000));
  for (int i = 0; i < W; i++) p[i].bits = uint16_t(r[i] >> 16);
}
template <class T>
static inline vf load_lanes(const T* p, int from, int to) {
  vf v{};
  for (int i = from; i < to; i++) v[i] = to_float(p[i]);
  return v;
}
template <class T>
static inline void store_lanes(T* p, vf v, int from, int to) {
  for (int i = from; i < to; i++) p[i] = from_float<T>(v[i]);
}
#endif

// Writes around the caches; p is at the start of its vector. Followed by the fence before anybody reads.
#if VLMO_AVX512
static inline void stream(float* p, vf v) { _mm512_stream_ps(p, (__m512)v); }
static inline void stream(bf16* p, vf v) { _mm256_stream_si256((__m256i*)p, bf16_bits(v)); }
static inline void stream(fp16* p, vf v) {
  _mm256_stream_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void stream_fence() { _mm_sfence(); }
#else
template <class T>
static inline void stream(T* p, vf v) {
  store(p, v);
}
static inline void stream_fence() {}
#endif

// ------------------------------------------------------------------ rows

// Calls body(i, lanes) for every vector of a row; the last may have fewer than W lanes.
template <class Body>
static inline void over_row(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + W <= width; i += W) body(i, W);
  if (i < width) body(i, int(width - i));
}
template <class T>
static inline vf load_some(const T* p, int lanes) {
  return lanes == W ? load(p) : load_lanes(p, 0, lanes);
}
template <class T>
static inline void store_some(T* p, vf v, int lanes) {
  if (lanes == W)
    store(p, v);
  else
    store_lanes(p, v, 0, lanes);
}

}  // namespace VLMO_LEVEL
}  // namespace vlmo_kernels
