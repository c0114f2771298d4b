// vlmo_kernels_cpu::attention_forward and attention_backward: shapes, strides and formats for the CPU kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "formats.h"
#include "tasks.h"
#include "vlmo_kernels/attention.h"
#include "vlmo_kernels/cpu_isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vlmo_kernels::Attention;
using vlmo_kernels::format_of;
using vlmo_kernels::Rows;

const vlmo_kernels::AttentionKernels& kernels() {
#if defined(__x86_64__)
  switch (vlmo_kernels::isa()) {
    case vlmo_kernels::Isa::amx: return vlmo_kernels::attention_kernels_amx;
    case vlmo_kernels::Isa::avx512bf16: return vlmo_kernels::attention_kernels_avx512bf16;
    case vlmo_kernels::Isa::avx512: return vlmo_kernels::attention_kernels_avx512;
    case vlmo_kernels::Isa::avx2: return vlmo_kernels::attention_kernels_avx2;
    case vlmo_kernels::Isa::portable: break;
  }
#endif
  return vlmo_kernels::attention_kernels_portable;
}

Rows rows_of(const Tensor& t, const char* name, const Tensor& like, int64_t heads) {
  STD_TORCH_CHECK(
      t.dim() == 3 && t.size(0) == like.size(0) && t.size(1) == heads && t.size(2) == like.size(2) &&
          t.scalar_type() == like.scalar_type() && (t.stride(2) == 1 || t.size(2) <= 1),
      "attention: `", name, "` must be [", like.size(0), ", ", heads, ", ", like.size(2),
      "] in the dtype of `q`, its last dimension contiguous");
  return {t.data_ptr(), t.stride(0), t.stride(1)};
}

const int32_t* table_of(const Tensor& t, const char* name, int64_t size) {
  STD_TORCH_CHECK(
      t.dim() == 1 && t.size(0) == size && t.scalar_type() == ScalarType::Int && t.is_contiguous(), "attention: `",
      name, "` must be int32 [", size, "], contiguous");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

Attention describe(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& prefix, const Tensor& cu_seqlens,
    const Tensor& rows, const Tensor& positions, bool causal, double scale) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3, "attention: `q` and `k` must be [T, H, Dh]");
  Attention a{};
  a.format = format_of(q, "attention", "q");
  a.tokens = q.size(0);
  a.heads = q.size(1);
  a.head_dim = q.size(2);
  a.kv_heads = k.size(1);
  STD_TORCH_CHECK(
      a.kv_heads > 0 && a.heads % a.kv_heads == 0, "attention: ", a.heads, " heads must be a multiple of ", a.kv_heads);
  a.q = rows_of(q, "q", q, a.heads);
  a.k = rows_of(k, "k", q, a.kv_heads);
  a.v = rows_of(v, "v", q, a.kv_heads);
  a.o = rows_of(o, "o", q, a.heads);
  STD_TORCH_CHECK(
      lse.dim() == 2 && lse.size(0) == a.heads && lse.size(1) == a.tokens && lse.is_contiguous() &&
          lse.scalar_type() == ScalarType::Float,
      "attention: `lse` must be fp32 [", a.heads, ", ", a.tokens, "], contiguous");
  a.lse = static_cast<float*>(lse.data_ptr());
  a.batch = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(a.batch >= 0, "attention: `cu_seqlens` must have an entry");
  a.cu_seqlens = table_of(cu_seqlens, "cu_seqlens", a.batch + 1);
  a.rows = table_of(rows, "rows", a.tokens);
  a.positions = table_of(positions, "positions", a.tokens);
  STD_TORCH_CHECK(a.cu_seqlens[0] == 0, "attention: `cu_seqlens` must start at 0, got ", a.cu_seqlens[0]);
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t length = int64_t{a.cu_seqlens[b + 1]} - a.cu_seqlens[b];
    STD_TORCH_CHECK(length >= 0, "attention: `cu_seqlens` must ascend, sample ", b, " has ", length, " tokens");
    a.longest = length > a.longest ? length : a.longest;
  }
  const int64_t live = a.cu_seqlens[a.batch];
  STD_TORCH_CHECK(live <= a.tokens, "attention: `cu_seqlens` ends at ", live, " of ", a.tokens, " rows");
  int64_t last_row = 0, last_position = 0, first = 0;
  for (int64_t i = 0; i < live; ++i) {
    const int64_t row = a.rows[i];
    first = row < first ? row : first;
    last_row = row > last_row ? row : last_row;
  }
  STD_TORCH_CHECK(
      live == 0 || (first >= 0 && last_row < a.tokens), "attention: `rows` must be 0 to ", a.tokens - 1, ", got ",
      first < 0 ? first : last_row);
  for (int64_t i = 0; i < live; ++i) {
    const int64_t position = a.positions[a.rows[i]];
    first = position < first ? position : first;
    last_position = position > last_position ? position : last_position;
  }
  a.bias_rows = a.bias_columns = INT32_MAX;
  if (bias) {
    STD_TORCH_CHECK(
        bias->dim() == 3 && bias->size(0) == a.heads && bias->is_contiguous(), "attention: `bias` must be [", a.heads,
        ", N, N], contiguous");
    a.bias = bias->const_data_ptr();
    a.bias_format = format_of(*bias, "attention", "bias");
    STD_TORCH_CHECK(
        a.bias_format == vlmo_kernels::FP32 || a.bias_format == a.format,
        "attention: `bias` must be fp32 or have the dtype of `q`");
    a.bias_rows = bias->size(1);
    a.bias_columns = bias->size(2);
  }
  STD_TORCH_CHECK(
      first >= 0 && (live == 0 || (last_position < a.bias_rows && last_position < a.bias_columns)),
      "attention: `positions` must be 0 to below the size of `bias`, got ", first < 0 ? first : last_position);
  a.prefix = prefix ? table_of(*prefix, "prefix", a.batch) : nullptr;
  a.causal = causal;
  a.scale = static_cast<float>(scale);
  return a;
}

using Run = void (*)(const Attention&, int64_t, int64_t, char*);

void run(const Attention& a, int64_t tasks, size_t scratch, Run kernel) {
  if (a.longest == 0 || a.head_dim == 0) return;
  vlmo_kernels::run_tasks(tasks, scratch, [&](int64_t task, char* memory) { kernel(a, task, task + 1, memory); });
}

void forward(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias, std::optional<Tensor> prefix, Tensor cu_seqlens,
    Tensor rows, Tensor positions, bool causal, double scale, Tensor o, Tensor lse) {
  const Attention a = describe(q, k, v, o, lse, bias, prefix, cu_seqlens, rows, positions, causal, scale);
  const auto& kernel = kernels();
  run(a, vlmo_kernels::forward_tasks(a), kernel.forward_scratch(a), kernel.forward);
}

int64_t dbias_groups(int64_t batch, int64_t kv_heads) { return vlmo_kernels::dbias_groups(batch, kv_heads); }

void backward(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, std::optional<Tensor> bias,
    std::optional<Tensor> prefix, Tensor cu_seqlens, Tensor rows, Tensor positions, bool causal, double scale,
    Tensor dq, Tensor dk, Tensor dv, std::optional<Tensor> dbias) {
  Attention a = describe(q, k, v, o, lse, bias, prefix, cu_seqlens, rows, positions, causal, scale);
  a.d_o = rows_of(grad, "grad", q, a.heads);
  a.dq = rows_of(dq, "dq", q, a.heads);
  a.dk = rows_of(dk, "dk", q, a.kv_heads);
  a.dv = rows_of(dv, "dv", q, a.kv_heads);
  if (dbias) {
    a.dbias_groups = vlmo_kernels::dbias_groups(a.batch, a.kv_heads);
    STD_TORCH_CHECK(
        bias && dbias->dim() == 4 && dbias->size(0) == a.dbias_groups && dbias->size(1) == a.heads &&
            dbias->size(2) == a.bias_rows && dbias->size(3) == a.bias_columns && dbias->is_contiguous() &&
            dbias->scalar_type() == ScalarType::Float,
        "attention: `dbias` must be fp32 [", a.dbias_groups, ", *bias.shape], contiguous");
    a.dbias = static_cast<float*>(dbias->mutable_data_ptr());
  }
  const auto& kernel = kernels();
  run(a, vlmo_kernels::backward_tasks(a), kernel.backward_scratch(a), kernel.backward);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmo_kernels_cpu, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? prefix, Tensor cu_seqlens, Tensor rows, "
      "Tensor positions, bool causal, float scale, Tensor(a!) o, Tensor(b!) lse) -> ()");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? bias, "
      "Tensor? prefix, Tensor cu_seqlens, Tensor rows, Tensor positions, bool causal, float scale, Tensor(a!) dq, "
      "Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias) -> ()");
  m.def("attention_dbias_groups(int batch, int kv_heads) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(vlmo_kernels_cpu, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(vlmo_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("attention_dbias_groups", TORCH_BOX(&dbias_groups));
}
