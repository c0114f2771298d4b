// vlmo_kernels_cpu::pack_weight, dense, dense_backward and weight_grad: shapes, strides and formats for the CPU kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "formats.h"
#include "sums.h"
#include "tasks.h"
#include "vlmo_kernels/cpu_isa.h"
#include "vlmo_kernels/dense.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vlmo_kernels::Activation;
using vlmo_kernels::Dense;
using vlmo_kernels::Format;
using vlmo_kernels::format_of;
using vlmo_kernels::Matrix;
using vlmo_kernels::Panels;

const vlmo_kernels::DenseKernels& kernels() {
#if defined(__x86_64__)
  if (vlmo_kernels::isa() >= vlmo_kernels::Isa::avx512bf16) return vlmo_kernels::dense_kernels_avx512bf16;
  if (vlmo_kernels::isa() == vlmo_kernels::Isa::avx512) return vlmo_kernels::dense_kernels_avx512;
  if (vlmo_kernels::isa() == vlmo_kernels::Isa::avx2) return vlmo_kernels::dense_kernels_avx2;
#endif
  return vlmo_kernels::dense_kernels_portable;
}

Matrix matrix_of(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(
      t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && (t.stride(1) == 1 || columns <= 1), "dense: `", name,
      "` must be [", rows, ", ", columns, "], its rows in one piece");
  return {format_of(t, "dense", name), t.data_ptr(), t.stride(0), false};
}

// One of the matrices around a product, which have the format of its result.
Matrix beside(const std::optional<Tensor>& t, const char* name, const Dense& a) {
  if (!t) return {};
  const Matrix m = matrix_of(*t, name, a.rows, a.n);
  STD_TORCH_CHECK(m.format == a.y.format, "dense: `", name, "` must have the dtype of the result");
  return m;
}

// For a result that is not read soon.
void stream(Matrix& m, const Dense& a) {
  const int64_t size = m.format == vlmo_kernels::FP32 ? 4 : 2;
  const bool lines = reinterpret_cast<uintptr_t>(m.data) % 64 == 0 && m.row * size % 64 == 0;
  m.streamed = lines && a.rows * a.n * size >= vlmo_kernels::STREAMED_BYTES;
}

const float* vector_of(const std::optional<Tensor>& t, const char* name, int64_t size) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(
      t->dim() == 1 && t->size(0) == size && t->scalar_type() == ScalarType::Float && t->is_contiguous(), "dense: `",
      name, "` must be fp32 [", size, "], contiguous");
  return static_cast<const float*>(t->const_data_ptr());
}

Activation activation_of(int64_t index) {
  STD_TORCH_CHECK(index >= 0 && index <= vlmo_kernels::SILU, "dense: `activation` must be 0 to 4, got ", index);
  return static_cast<Activation>(index);
}

// Packed operands up to this size go into memory that is kept.
constexpr size_t MOST_KEPT = 64 << 20;

int64_t panel_elements(int64_t n, int64_t k) { return vlmo_kernels::packed_size(n) * vlmo_kernels::packed_size(k); }

// `w` [n, k], or [k, n] with `swapped`, as the right operand of `x w'` or `x w`, into what `memory` returns for a
// number of elements.
template <class Memory>
void pack(const Tensor& w, bool swapped, Memory memory) {
  STD_TORCH_CHECK(w.dim() == 2, "pack_weight: `w` must be a matrix, got ", w.dim(), " dimensions");
  const Matrix from = matrix_of(w, "w", w.size(0), w.size(1));
  Panels to{from.format, w.size(swapped ? 1 : 0), w.size(swapped ? 0 : 1), nullptr};
  to.data = memory(panel_elements(to.n, to.k));
  const int64_t tasks = vlmo_kernels::packed_size(w.size(0)) / 32;
  vlmo_kernels::run_tasks(tasks, 0, [&](int64_t task, char*) { kernels().pack(from, swapped, to, task); });
}

bool stays_bf16(Format format) { return format == vlmo_kernels::BF16 && kernels().bf16; }

Tensor pack_weight(Tensor w, bool swapped) {
  std::optional<Tensor> out;
  pack(w, swapped, [&](int64_t elements) {
    const auto type = stays_bf16(format_of(w, "pack_weight", "w")) ? ScalarType::BFloat16 : ScalarType::Float;
    out = torch::stable::new_empty(w, {&elements, 1}, std::make_optional(type));
    return out->mutable_data_ptr();
  });
  return *out;
}

// What forward and backward have in common.
Dense describe(
    const Tensor& x, const char* x_name, const Tensor& panels, const Tensor& y, const char* y_name, Format format) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2, "dense: `", x_name, "` and `", y_name, "` must be matrices");
  Dense a{};
  a.format = format;
  a.rows = x.size(0);
  a.k = x.size(1);
  a.n = y.size(1);
  a.x = matrix_of(x, x_name, a.rows, a.k);
  a.y = matrix_of(y, y_name, a.rows, a.n);
  STD_TORCH_CHECK(
      panels.numel() == panel_elements(a.n, a.k) && panels.is_contiguous() &&
          panels.scalar_type() == (stays_bf16(format) ? ScalarType::BFloat16 : ScalarType::Float),
      "dense: `panels` must be what pack_weight makes of a weight of ", a.n, " by ", a.k);
  a.panels = panels.const_data_ptr();
  return a;
}

void run(Dense& a) {
  const auto& kernel = kernels();
  const int64_t operand = stays_bf16(a.format) ? 2 : 4;
  a.piece = a.by_columns ? vlmo_kernels::PIECE_BYTES / operand : vlmo_kernels::DEEPEST;
  a.tile = vlmo_kernels::tile_for(a.rows, a.n, std::min(a.k, a.piece) * operand, torch::stable::get_num_threads());
  vlmo_kernels::run_tasks(
      vlmo_kernels::tasks_of(a.tile, a.rows, a.n), kernel.scratch(a),
      [&](int64_t task, char* scratch) { kernel.dense(a, task, scratch); });
}

void dense(
    Tensor x, Tensor panels, std::optional<Tensor> bias, int64_t activation, std::optional<Tensor> gamma,
    std::optional<Tensor> row_scale, std::optional<Tensor> residual, std::optional<Tensor> pre, Tensor y) {
  Dense a = describe(x, "x", panels, y, "y", format_of(x, "dense", "x"));
  a.bias = vector_of(bias, "bias", a.n);
  a.activation = activation_of(activation);
  a.gamma = vector_of(gamma, "gamma", a.n);
  a.row_scale = vector_of(row_scale, "row_scale", a.rows);
  a.residual = beside(residual, "residual", a);
  a.pre = beside(pre, "pre", a);
  stream(a.pre, a);
  run(a);
}

Tensor dense_backward(
    Tensor dy, std::optional<Tensor> gamma, Tensor panels, int64_t activation, std::optional<Tensor> pre,
    std::optional<Tensor> hidden, bool sums, Tensor dx) {
  Dense a = describe(dy, "dy", panels, dx, "dx", format_of(dx, "dense", "dx"));
  a.backward = true;
  a.x_columns = vector_of(gamma, "gamma", a.k);
  a.activation = activation_of(activation);
  STD_TORCH_CHECK(pre.has_value() == (activation != 0), "dense_backward: `pre` belongs to an activation");
  STD_TORCH_CHECK(pre || !hidden, "dense_backward: `hidden` needs `pre`");
  a.pre = beside(pre, "pre", a);
  a.hidden = beside(hidden, "hidden", a);
  stream(a.hidden, a);
  if (hidden) stream(a.y, a);
  const int64_t pieces = vlmo_kernels::pieces(a.rows, vlmo_kernels::SUM_ROWS), width[] = {sums ? a.n : 0};
  const auto parts = vlmo_kernels::floats(pieces * width[0]);
  a.sums = sums ? parts.get() : nullptr;
  run(a);
  const Tensor total = torch::stable::new_empty(dx, {width, 1}, std::make_optional(ScalarType::Float));
  vlmo_kernels::add_up(parts.get(), pieces, width[0], static_cast<float*>(total.mutable_data_ptr()));
  return total;
}

// `dw` = gamma * (dy' x); returns the row sums of w * (dy' x), or nothing without `w`.
Tensor weight_grad(Tensor dy, Tensor x, std::optional<Tensor> gamma, std::optional<Tensor> w, Tensor dw) {
  STD_TORCH_CHECK(dy.dim() == 2 && x.dim() == 2, "dense: `dy` and `x` must be matrices");
  Dense a{};
  a.format = format_of(x, "dense", "x");
  a.rows = dy.size(1);
  a.n = x.size(1);
  a.k = x.size(0);
  a.x = matrix_of(dy, "dy", a.k, a.rows);
  a.by_columns = true;
  a.y = matrix_of(dw, "dw", a.rows, a.n);
  a.row_scale = vector_of(gamma, "gamma", a.rows);
  a.dotted = beside(w, "w", a);
  struct Packed;
  std::unique_ptr<char[]> large;
  pack(x, true, [&](int64_t elements) {
    const size_t bytes = elements * (stays_bf16(a.format) ? 2 : 4);
    if (bytes > MOST_KEPT) large.reset(new char[bytes]);
    char* memory = large ? large.get() : vlmo_kernels::kept_memory<Packed>(bytes);
    a.panels = memory;
    return memory;
  });
  const int64_t pieces = vlmo_kernels::pieces(a.n, vlmo_kernels::SUM_COLUMNS), width[] = {w ? a.rows : 0};
  const auto parts = vlmo_kernels::floats(pieces * width[0]);
  a.dots = w ? parts.get() : nullptr;
  run(a);
  const Tensor total = torch::stable::new_empty(x, {width, 1}, std::make_optional(ScalarType::Float));
  vlmo_kernels::add_up(parts.get(), pieces, width[0], static_cast<float*>(total.mutable_data_ptr()));
  return total;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmo_kernels_cpu, m) {
  m.def("pack_weight(Tensor w, bool swapped) -> Tensor");
  m.def(
      "dense(Tensor x, Tensor panels, Tensor? bias, int activation, Tensor? gamma, Tensor? row_scale, "
      "Tensor? residual, Tensor(a!)? pre, Tensor(b!) y) -> ()");
  m.def(
      "dense_backward(Tensor dy, Tensor? gamma, Tensor panels, int activation, Tensor? pre, "
      "Tensor(a!)? hidden, bool sums, Tensor(b!) dx) -> Tensor");
  m.def("weight_grad(Tensor dy, Tensor x, Tensor? gamma, Tensor? w, Tensor(a!) dw) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vlmo_kernels_cpu, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("dense", TORCH_BOX(&dense));
  m.impl("dense_backward", TORCH_BOX(&dense_backward));
  m.impl("weight_grad", TORCH_BOX(&weight_grad));
}
