// The number format of a tensor, as the kernels name it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "vlmo_kernels/format.h"

namespace vlmo_kernels {

inline Format format_of(const torch::stable::Tensor& t, const char* op, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": `", name,
      "` must be fp32, bf16 or fp16");
  return type == ScalarType::Float ? FP32 : type == ScalarType::BFloat16 ? BF16 : FP16;
}

}  // namespace vlmo_kernels
