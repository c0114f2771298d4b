// The attention kernels of one level, as csrc/cpu instantiates them.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"

namespace vlmo_kernels {
namespace VLMO_LEVEL {

#if defined(__AVX512BF16__)
typedef bf16 Operand;  // of bf16 products
#else
typedef float Operand;
#endif

static size_t forward_scratch(const Attention& a) {
  if (a.format == BF16) return forward_scratch_of<bf16, Operand>(a);
  return a.format == FP16 ? forward_scratch_of<fp16, float>(a) : forward_scratch_of<float, float>(a);
}
static void forward(const Attention& a, int64_t first, int64_t end, char* scratch) {
  if (a.format == BF16) return forward_tasks_of<bf16, Operand>(a, first, end, scratch);
  if (a.format == FP16) return forward_tasks_of<fp16, float>(a, first, end, scratch);
  forward_tasks_of<float, float>(a, first, end, scratch);
}
static size_t backward_scratch(const Attention& a) {
  if (a.format == BF16) return backward_scratch_of<bf16, Operand>(a);
  return a.format == FP16 ? backward_scratch_of<fp16, float>(a) : backward_scratch_of<float, float>(a);
}
static void backward(const Attention& a, int64_t first, int64_t end, char* scratch) {
  if (a.format == BF16) return backward_tasks_of<bf16, Operand>(a, first, end, scratch);
  if (a.format == FP16) return backward_tasks_of<fp16, float>(a, first, end, scratch);
  backward_tasks_of<float, float>(a, first, end, scratch);
}

}  // namespace VLMO_LEVEL

const AttentionKernels VLMO_JOIN(attention_kernels_, VLMO_LEVEL) = {VLMO_LEVEL::forward_scratch, VLMO_LEVEL::forward,
                                                                    VLMO_LEVEL::backward_scratch, VLMO_LEVEL::backward};

}  // namespace vlmo_kernels
