// Rows of a strided buffer as operands of `Gemm`: row-major A, its transpose, and panels of B and of its transpose.
//
// A token's row is first copied into a zero-padded block of 32 rows in the operand's format; the other layouts are
// made from that block while it is in the first-level cache.
#pragma once

#include "gemm.h"

namespace vlmo_kernels {
namespace VLMO_LEVEL {

constexpr int BLOCK = 32;  // rows of a block, and what token counts and head dims are padded to

template <class T>
static inline void copy_same(const T* from, int64_t n, T* to) {
  constexpr int step = 4 * W / sizeof(T);
  int64_t i = 0;
  for (; i + step <= n; i += step) __builtin_memcpy(to + i, from + i, 4 * W);
  for (; i < n; i++) to[i] = from[i];
}
static inline void copy_row(const float* from, int64_t n, float* to) { copy_same(from, n, to); }
static inline void copy_row(const bf16* from, int64_t n, bf16* to) { copy_same(from, n, to); }
template <class T>
static inline void copy_row(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  for (; i < n; i++) to[i] = to_float(from[i]);
}

// `count` (at most BLOCK) rows `base + rows[i] * stride` of `dim` elements into `block` [BLOCK, padded]; the rest
// is zero.
template <class T, class E>
static inline void gather_block(const T* base, int64_t stride, const int32_t* rows, int64_t count, int64_t dim,
                                int64_t padded, E* block) {
  for (int64_t i = 0; i < count; i++) {
    E* row = block + i * padded;
    copy_row(base + rows[i] * stride, dim, row);
    if (dim < padded) __builtin_memset(row + dim, 0, (padded - dim) * sizeof(E));
  }
  if (count < BLOCK) __builtin_memset(block + count * padded, 0, (BLOCK - count) * padded * sizeof(E));
}

#if VLMO_AVX512
// Transposes 16 rows of 16 double words.
static inline void transpose_words(const uint32_t* from, int64_t stride, uint32_t* to, int64_t to_stride) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // r[4g + i]: column i of each quarter, of rows 4g to 4g + 3
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88));
    _mm512_storeu_si512(to + (4 + i) * to_stride, _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88));
    _mm512_storeu_si512(to + (8 + i) * to_stride, _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd));
    _mm512_storeu_si512(to + (12 + i) * to_stride, _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd));
  }
}
#else
static inline void transpose_words(const uint32_t* from, int64_t stride, uint32_t* to, int64_t to_stride) {
  for (int i = 0; i < W; i++)
    for (int j = 0; j < W; j++) to[j * to_stride + i] = from[i * stride + j];
}
#endif

// A block [BLOCK, padded] as BLOCK columns of B: k is the element, n the row. `panel` elements from panel to panel.
template <class E>
static inline void transposed_panels(const E* block, int64_t padded, E* to, int64_t panel) {
  constexpr int width = Gemm<E>::width;
  const int64_t words = padded * sizeof(E) / 4;
  for (int i = 0; i < BLOCK; i += W)
    for (int64_t k = 0; k < words; k += W)
      transpose_words((const uint32_t*)(block + i * padded) + k, words,
                      (uint32_t*)(to + i / width * panel) + k * width + i % width, width);
}

// A block [BLOCK, padded] as BLOCK rows of B from row k on: k is the row, n the element.
static inline void panels(const float* block, int64_t padded, int64_t k, float* to, int64_t panel) {
  constexpr int width = Gemm<float>::width;
  for (int64_t j = 0; j < padded; j += width, to += panel)
    for (int i = 0; i < BLOCK; i++)
      for (int v = 0; v < width; v += W) store(to + (k + i) * width + v, load(block + i * padded + j + v));
}

// A block transposed into columns `column` on of a row-major A [padded, stride].
static inline void transposed_rows(const float* block, int64_t padded, float* to, int64_t stride) {
  for (int i = 0; i < BLOCK; i += W)
    for (int64_t k = 0; k < padded; k += W)
      transpose_words((const uint32_t*)(block + i * padded) + k, padded, (uint32_t*)(to + k * stride + i), stride);
}

#if defined(__AVX512BF16__)
static inline void panels(const bf16* block, int64_t padded, int64_t k, bf16* to, int64_t panel) {
  constexpr int width = Gemm<bf16>::width;
  for (int64_t j = 0; j < padded; j += width, to += panel)
    for (int i = 0; i < BLOCK; i += 2)
      for (int v = 0; v < width; v += 16) {
        const bf16* p = block + i * padded + j + v;
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(p + padded)));
        _mm512_storeu_si512(to + (k + i) * width + 2 * v, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
}

static inline void transposed_rows(const bf16* block, int64_t padded, bf16* to, int64_t stride) {
  uint32_t words[16][16];  // row: a pair of elements; column: a row of the block
  for (int i = 0; i < BLOCK; i += 16)
    for (int64_t k = 0; k < padded; k += 32) {
      transpose_words((const uint32_t*)(block + i * padded + k), padded / 2, words[0], 16);
      for (int r = 0; r < 16; r++) {
        const __m512i pair = _mm512_loadu_si512(words[r]);
        bf16* p = to + (k + 2 * r) * stride + i;
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(pair));
        _mm256_storeu_si256((__m256i*)(p + stride), _mm512_cvtepi32_epi16(_mm512_srli_epi32(pair, 16)));
      }
    }
}
#endif

}  // namespace VLMO_LEVEL
}  // namespace vlmo_kernels
