// The norm kernels of one instruction set, as csrc/cpu instantiates them.
#pragma once

#include "norm.h"
#include "vec.h"

namespace vlmo_kernels {
namespace VLMO_LEVEL {

static inline vf factor_at(const Norm& a, int64_t i, int lanes) {
  if (!a.weight) return set1(1.0f);
  const vf w = load_some(a.weight + i, lanes);
  return a.one_plus ? w + 1.0f : w;
}

template <class T>
static void norm_forward(const Norm& a, int64_t block, float* row) {
  const int64_t first = block * NORM_BLOCK, end = min_of(a.rows, first + NORM_BLOCK);
  const float share = 1.0f / float(a.width);
  for (int64_t r = first; r < end; r++) {
    const T* x = (const T*)a.x + r * a.x_row;
    const T* residual = a.residual ? (const T*)a.residual + r * a.residual_row : nullptr;
    T* z = (T*)a.z + r * a.width;
    vf sum{}, squares{};
    over_row(a.width, [&](int64_t i, int lanes) {
      vf v = load_some(x + i, lanes);
      if (residual) {  // what is normalised is the sum as it is stored
        store_some(z + i, v + load_some(residual + i, lanes), lanes);
        v = load_some(z + i, lanes);
      }
      store_some(row + i, v, lanes);
      sum = sum + v;
      squares = fma(v, v, squares);
    });
    float mean = 0, variance = sum_of(squares) * share;
    if (a.centred) {
      mean = sum_of(sum) * share;
      vf around{};
      over_row(a.width, [&](int64_t i, int lanes) {
        vf d = load_some(row + i, lanes) - mean;
        if (lanes < W) {  // lanes past the end are no deviations
          float rest[W] = {};
          store_lanes(rest, d, 0, lanes);
          d = load(rest);
        }
        around = fma(d, d, around);
      });
      variance = sum_of(around) * share;
      a.mean[r] = mean;
    }
    const float rstd = 1.0f / __builtin_sqrtf(variance + a.eps);
    a.rstd[r] = rstd;
    T* y = (T*)a.y + r * a.width;
    over_row(a.width, [&](int64_t i, int lanes) {
      vf v = (load_some(row + i, lanes) - mean) * rstd * factor_at(a, i, lanes);
      if (a.bias) v = v + load_some(a.bias + i, lanes);
      store_some(y + i, v, lanes);
    });
  }
}

// dx = rstd (g - n mean(g n) - mean(g)) + dz, with g = dy * factor and n the normalised row.
template <class T>
static void norm_backward(const Norm& a, int64_t block, float* scratch) {
  const int64_t first = block * NORM_BLOCK, end = min_of(a.rows, first + NORM_BLOCK);
  const int64_t padded = round_up(a.width, 16);
  const float share = 1.0f / float(a.width);
  float *normal = scratch, *scaled = scratch + padded;
  float* dweight = a.dweight ? a.dweight + block * a.width : nullptr;
  float* dbias = a.dbias ? a.dbias + block * a.width : nullptr;
  if (dweight) __builtin_memset(dweight, 0, a.width * sizeof(float));
  if (dbias) __builtin_memset(dbias, 0, a.width * sizeof(float));
  for (int64_t r = first; r < end; r++) {
    const T *z = (const T*)a.x + r * a.x_row, *dy = (const T*)a.dy + r * a.width;
    const T* dz = a.dz ? (const T*)a.dz + r * a.width : nullptr;
    const float mean = a.centred ? a.mean[r] : 0, rstd = a.rstd[r];
    vf along{}, sum{};
    over_row(a.width, [&](int64_t i, int lanes) {
      const vf n = (load_some(z + i, lanes) - mean) * rstd, g = load_some(dy + i, lanes);
      const vf s = g * factor_at(a, i, lanes);
      if (dweight) store_some(dweight + i, fma(g, n, load_some(dweight + i, lanes)), lanes);
      if (dbias) store_some(dbias + i, load_some(dbias + i, lanes) + g, lanes);
      store_some(normal + i, n, lanes);
      store_some(scaled + i, s, lanes);
      along = fma(s, n, along);
      sum = sum + s;
    });
    const float slope = sum_of(along) * share, offset = a.centred ? sum_of(sum) * share : 0;
    T* dx = (T*)a.dx + r * a.width;
    over_row(a.width, [&](int64_t i, int lanes) {
      const vf n = load_some(normal + i, lanes), s = load_some(scaled + i, lanes);
      vf v = (s - offset - n * slope) * rstd;
      if (dz) v = v + load_some(dz + i, lanes);
      store_some(dx + i, v, lanes);
    });
  }
}

template <class T>
static void sum_rows(const Sums& a, int64_t block) {
  const int64_t first = block * NORM_BLOCK, end = min_of(a.rows, first + NORM_BLOCK);
  float* out = a.parts + block * a.width;
  for (int64_t r = first; r < end; r++) {
    const T* x = (const T*)a.x + r * a.row;
    over_row(a.width, [&](int64_t i, int lanes) {
      const vf v = load_some(x + i, lanes);
      store_some(out + i, r == first ? v : load_some(out + i, lanes) + v, lanes);
    });
  }
}

static void add_blocks(const float* parts, int64_t blocks, int64_t width, int64_t from, int64_t to, float* out) {
  for (int64_t b = 0; b < blocks; b++)
    over_row(to - from, [&](int64_t i, int lanes) {
      const vf v = load_some(parts + b * width + from + i, lanes);
      store_some(out + from + i, b == 0 ? v : load_some(out + from + i, lanes) + v, lanes);
    });
}

static void forward_of(const Norm& a, int64_t block, float* scratch) {
  if (a.format == BF16) return norm_forward<bf16>(a, block, scratch);
  a.format == FP16 ? norm_forward<fp16>(a, block, scratch) : norm_forward<float>(a, block, scratch);
}
static void backward_of(const Norm& a, int64_t block, float* scratch) {
  if (a.format == BF16) return norm_backward<bf16>(a, block, scratch);
  a.format == FP16 ? norm_backward<fp16>(a, block, scratch) : norm_backward<float>(a, block, scratch);
}
static void sum_block_of(const Sums& a, int64_t block) {
  if (a.format == BF16) return sum_rows<bf16>(a, block);
  a.format == FP16 ? sum_rows<fp16>(a, block) : sum_rows<float>(a, block);
}

}  // namespace VLMO_LEVEL

const NormKernels VLMO_JOIN(norm_kernels_, VLMO_LEVEL) = {VLMO_LEVEL::forward_of, VLMO_LEVEL::backward_of,
                                                          VLMO_LEVEL::sum_block_of, VLMO_LEVEL::add_blocks};

}  // namespace vlmo_kernels
