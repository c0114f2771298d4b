// LayerNorm and RMSNorm with a residual sum on the CPU, their gradients, and sums over rows.
//
// Rows are taken in blocks of NORM_BLOCK; a block is a task. Sums over all rows are formed per block and added up in
// the order of the blocks, so they do not depend on the number of threads.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "format.h"

namespace vlmo_kernels {

constexpr int64_t NORM_BLOCK = 64;     // rows of a task
constexpr int64_t COLUMN_BLOCK = 256;  // columns of a task that adds up blocks

struct Norm {
  Format format;  // of x, residual, y, z, dy, dz and dx
  int64_t rows, width;
  bool centred;   // LayerNorm; otherwise RMSNorm
  bool one_plus;  // the factor is 1 + weight
  float eps;
  const float *weight, *bias;  // [width] or null
  float *mean, *rstd;          // [rows]; no mean unless centred

  const void *x, *residual;  // [rows, width]; residual may be null
  int64_t x_row, residual_row;
  void *y, *z;  // contiguous; z = x + residual, null without a residual

  // Backward only; z is what was normalised, with row stride x_row in `x`.
  const void *dy, *dz;     // contiguous; dz may be null
  void* dx;                // contiguous
  float *dweight, *dbias;  // [blocks, width] or null
};

// Sums over the rows of a block, into parts [blocks, width].
struct Sums {
  Format format;
  int64_t rows, width, row;  // row: stride
  const void* x;
  float* parts;
};

static inline int64_t norm_blocks(int64_t rows) { return (rows + NORM_BLOCK - 1) / NORM_BLOCK; }

struct NormKernels {
  // Scratch: two rows of floats, each rounded up to 16.
  void (*forward)(const Norm&, int64_t block, float* scratch);
  void (*backward)(const Norm&, int64_t block, float* scratch);
  void (*sum_block)(const Sums&, int64_t block);
  // Columns `from` to `to` of `out` [width]: the sum of parts [blocks, width].
  void (*add_blocks)(const float* parts, int64_t blocks, int64_t width, int64_t from, int64_t to, float* out);
};

// One for every instruction set of cpu_isa.h that makes a difference.
extern const NormKernels norm_kernels_portable, norm_kernels_avx2, norm_kernels_avx512;

}  // namespace vlmo_kernels
