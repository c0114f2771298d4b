// Small matrix products `C (+)= A B` for operands that lie in a core's cache.
//
// A is row-major. B lies in panels of `width` columns: row k of a panel is contiguous, and for bf16 two rows are
// interleaved (column 0 of rows 0 and 1, column 1 of rows 0 and 1, ...), which is what the dot product
// instructions read. C is fp32, row-major. Sizes are multiples of the steps below; callers pad with zeros.
#pragma once

#include "vec.h"

namespace vlmo_kernels {
namespace VLMO_LEVEL {

template <class E>
struct Gemm;

template <>
struct Gemm<float> {
  static constexpr int width = 2 * W;
  static constexpr int row_step = W == 16 ? 8 : 4;  // what the registers hold: row_step * 2 accumulators
  static constexpr int depth_step = 1;

  static void open() {}
  static void close() {}

  // m in steps of row_step, n of width, any k; `panel` is the number of elements from panel to panel. Products are
  // summed by 64 and these sums added up: one long sum would lose a digit more than a library's product does.
  static void run(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t panel, float* c,
                  int64_t ldc, bool add) {
    for (int64_t j = 0; j < n; j += width, b += panel)
      for (int64_t p = 0; p < k || p == 0; p += 64)
        for (int64_t i = 0; i < m; i += row_step)
          block(min_of<int64_t>(64, k - p), a + i * lda + p, lda, b + p * width, c + i * ldc + j, ldc, add || p > 0);
  }

 private:
  static inline void block(int64_t k, const float* a, int64_t lda, const float* b, float* c, int64_t ldc, bool add) {
    vf left[row_step], right[row_step];
#pragma GCC unroll 8
    for (int r = 0; r < row_step; r++) {
      left[r] = right[r] = vf{};
    }
    for (int64_t p = 0; p < k; p++) {
      const vf b0 = load(b + p * width), b1 = load(b + p * width + W);
#pragma GCC unroll 8
      for (int r = 0; r < row_step; r++) {
        const vf x = set1(a[r * lda + p]);
        left[r] = fma(x, b0, left[r]);
        right[r] = fma(x, b1, right[r]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < row_step; r++) {
      store(c + r * ldc, add ? load(c + r * ldc) + left[r] : left[r]);
      store(c + r * ldc + W, add ? load(c + r * ldc + W) + right[r] : right[r]);
    }
  }
};

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)

template <>
struct Gemm<bf16> {
  static constexpr int width = 32;
  static constexpr int row_step = 16;
  static constexpr int depth_step = 32;

  // Eight tiles of 16 rows of 64 bytes: 0 to 3 accumulate, 4 and 5 hold A, 6 and 7 hold B.
  static void open() {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int t = 0; t < 8; t++) {
      config.bytes[t] = 64;
      config.rows[t] = 16;
    }
    _tile_loadconfig(&config);
  }
  // Tiles left in use would make every later context switch save 8 KB.
  static void close() { _tile_release(); }

  // m in steps of 16, n and k of 32.
  static void run(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const bf16* b, int64_t panel, float* c,
                  int64_t ldc, bool add) {
    // The tile intrinsics do not tell the compiler that they read memory.
    asm volatile("" ::: "memory");
    for (int64_t j = 0; j < n; j += width, b += panel) {
      int64_t i = 0;
      for (; i + 32 <= m; i += 32) two_by_two(k, a + i * lda, lda, b, c + i * ldc + j, ldc, add);
      if (i < m) one_by_two(k, a + i * lda, lda, b, c + i * ldc + j, ldc, add);
    }
    asm volatile("" ::: "memory");
  }

 private:
  static inline void two_by_two(int64_t k, const bf16* a, int64_t lda, const bf16* b, float* c, int64_t ldc, bool add) {
    if (add) {
      _tile_loadd(0, c, ldc * 4);
      _tile_loadd(1, c + 16, ldc * 4);
      _tile_loadd(2, c + 16 * ldc, ldc * 4);
      _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t p = 0; p < k; p += 32) {
      _tile_loadd(6, b + p * width, 4 * width);
      _tile_loadd(7, b + p * width + 32, 4 * width);
      _tile_loadd(4, a + p, lda * 2);
      _tile_loadd(5, a + 16 * lda + p, lda * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + 16, ldc * 4);
    _tile_stored(2, c + 16 * ldc, ldc * 4);
    _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
  }

  static inline void one_by_two(int64_t k, const bf16* a, int64_t lda, const bf16* b, float* c, int64_t ldc, bool add) {
    if (add) {
      _tile_loadd(0, c, ldc * 4);
      _tile_loadd(1, c + 16, ldc * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    for (int64_t p = 0; p < k; p += 32) {
      _tile_loadd(6, b + p * width, 4 * width);
      _tile_loadd(7, b + p * width + 32, 4 * width);
      _tile_loadd(4, a + p, lda * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + 16, ldc * 4);
  }
};

#elif defined(__AVX512BF16__)

template <>
struct Gemm<bf16> {
  static constexpr int width = 32;
  static constexpr int row_step = 8;
  static constexpr int depth_step = 2;

  static void open() {}
  static void close() {}

  // m in steps of 8, n of 32, k of 2.
  static void run(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const bf16* b, int64_t panel, float* c,
                  int64_t ldc, bool add) {
    for (int64_t j = 0; j < n; j += width, b += panel)
      for (int64_t i = 0; i < m; i += row_step) block(k, a + i * lda, lda, b, c + i * ldc + j, ldc, add);
  }

 private:
  static inline void block(int64_t k, const bf16* a, int64_t lda, const bf16* b, float* c, int64_t ldc, bool add) {
    __m512 left[row_step], right[row_step];
#pragma GCC unroll 8
    for (int r = 0; r < row_step; r++) {
      left[r] = add ? _mm512_loadu_ps(c + r * ldc) : _mm512_setzero_ps();
      right[r] = add ? _mm512_loadu_ps(c + r * ldc + 16) : _mm512_setzero_ps();
    }
    for (int64_t p = 0; p < k; p += 2) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + p * width);
      const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + p * width + 32);
#pragma GCC unroll 8
      for (int r = 0; r < row_step; r++) {
        int32_t pair;
        __builtin_memcpy(&pair, a + r * lda + p, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        left[r] = _mm512_dpbf16_ps(left[r], x, b0);
        right[r] = _mm512_dpbf16_ps(right[r], x, b1);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < row_step; r++) {
      _mm512_storeu_ps(c + r * ldc, left[r]);
      _mm512_storeu_ps(c + r * ldc + 16, right[r]);
    }
  }
};

#endif

}  // namespace VLMO_LEVEL
}  // namespace vlmo_kernels
