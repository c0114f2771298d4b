// Row-table attention on the CPU: what a call is, how it falls into tasks, and the kernels of every level.
//
// Tasks depend on shapes alone and write to places of their own, so results do not depend on how many threads
// run them, or in which order.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "format.h"

namespace vlmo_kernels {

// A [rows, heads, dim] buffer; elements of a head are contiguous, the strides count elements.
struct Rows {
  void* data;
  int64_t row, head;
};

struct Attention {
  Format format;  // of everything but lse, bias and dbias
  int64_t batch, tokens, heads, kv_heads, head_dim;
  Rows q, k, v;
  const int32_t* cu_seqlens;  // [batch + 1]
  const int32_t* rows;        // [tokens], sample-major position to packed row
  const int32_t* positions;   // [tokens], by packed row
  int64_t longest;            // tokens of the longest sample

  const void* bias;  // [heads, bias_rows, bias_columns] by query and key position, or null
  Format bias_format;
  int64_t bias_rows, bias_columns;
  bool causal;
  const int32_t* prefix;  // [batch] or null; keys before this position are visible under `causal`
  float scale;

  Rows o;
  float* lse;  // [heads, tokens]

  // Backward only.
  Rows d_o, dq, dk, dv;
  float* dbias;  // [dbias_groups, heads, bias_rows, bias_columns], partial sums over samples; or null
  int64_t dbias_groups;
};

// Number of independent sums the bias gradient is formed in: enough tasks for many cores, few enough that the
// partial sums stay small. It depends on shapes alone.
static inline int64_t dbias_groups(int64_t batch, int64_t kv_heads) {
  const int64_t wanted = (32 + kv_heads - 1) / kv_heads;
  return batch < 1 ? 1 : wanted < batch ? wanted : batch;
}

// Query chunks a sample is cut into where samples and heads alone would make few tasks.
static inline int64_t query_chunks(const Attention& a) {
  const int64_t pairs = a.batch * a.kv_heads, most = (a.longest + 127) / 128;
  const int64_t wanted = pairs > 0 ? (64 + pairs - 1) / pairs : 1;
  const int64_t chunks = wanted < most ? wanted : most;
  return chunks < 1 ? 1 : chunks;
}

static inline int64_t forward_tasks(const Attention& a) { return a.batch * a.kv_heads * query_chunks(a); }
static inline int64_t backward_groups(const Attention& a) { return a.dbias ? a.dbias_groups : a.batch; }
static inline int64_t backward_tasks(const Attention& a) { return a.kv_heads * backward_groups(a); }

struct AttentionKernels {
  size_t (*forward_scratch)(const Attention&);  // bytes a thread needs, 64-byte aligned
  void (*forward)(const Attention&, int64_t first_task, int64_t end_task, char* scratch);
  size_t (*backward_scratch)(const Attention&);
  void (*backward)(const Attention&, int64_t first_task, int64_t end_task, char* scratch);
};

// One for every instruction set of cpu_isa.h.
extern const AttentionKernels attention_kernels_portable, attention_kernels_avx2, attention_kernels_avx512,
    attention_kernels_avx512bf16, attention_kernels_amx;

}  // namespace vlmo_kernels
