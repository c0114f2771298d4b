// Sums over rows that were formed in pieces, added up in the order of the pieces.
#pragma once

#include <algorithm>
#include <memory>

#include "tasks.h"
#include "vlmo_kernels/cpu_isa.h"
#include "vlmo_kernels/norm.h"

namespace vlmo_kernels {

inline const NormKernels& norm_kernels() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return norm_kernels_avx512;
  if (isa() == Isa::avx2) return norm_kernels_avx2;
#endif
  return norm_kernels_portable;
}

inline std::unique_ptr<float[]> floats(int64_t n) { return std::unique_ptr<float[]>(new float[n]); }

// `out` [width] from parts [blocks, width].
inline void add_up(const float* parts, int64_t blocks, int64_t width, float* out) {
  const auto& kernel = norm_kernels();
  if (blocks == 0) std::fill(out, out + width, 0.0f);
  run_tasks((width + COLUMN_BLOCK - 1) / COLUMN_BLOCK, 0, [&](int64_t task, char*) {
    kernel.add_blocks(parts, blocks, width, task * COLUMN_BLOCK, std::min(width, (task + 1) * COLUMN_BLOCK), out);
  });
}

}  // namespace vlmo_kernels
