// vlmo_kernels_cpu::norm_forward, norm_backward and column_sums: shapes, strides and formats for the CPU kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "formats.h"
#include "sums.h"
#include "tasks.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vlmo_kernels::add_up;
using vlmo_kernels::floats;
using vlmo_kernels::format_of;
using vlmo_kernels::Norm;
using vlmo_kernels::norm_kernels;

void* rows_of(const Tensor& t, const char* name, const Tensor& like, bool contiguous) {
  STD_TORCH_CHECK(
      t.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == like.size(1) &&
          t.scalar_type() == like.scalar_type() && (contiguous ? t.is_contiguous() : t.stride(1) == 1 || t.size(1) == 1),
      "norm: `", name, "` must be [", like.size(0), ", ", like.size(1), "] in one dtype, with ",
      contiguous ? "no gaps" : "rows in one piece");
  return t.data_ptr();
}

float* vector_of(const Tensor& t, const char* name, int64_t size) {
  STD_TORCH_CHECK(
      t.dim() == 1 && t.size(0) == size && t.scalar_type() == ScalarType::Float && t.is_contiguous(), "norm: `", name,
      "` must be fp32 [", size, "], contiguous");
  return static_cast<float*>(t.data_ptr());
}
float* vector_of(const std::optional<Tensor>& t, const char* name, int64_t size) {
  return t ? vector_of(*t, name, size) : nullptr;
}

using Run = void (*)(const Norm&, int64_t, float*);

void run(const Norm& a, Run kernel) {
  const size_t scratch = 2 * (a.width + 16) * sizeof(float);
  vlmo_kernels::run_tasks(vlmo_kernels::norm_blocks(a.rows), scratch, [&](int64_t block, char* memory) {
    kernel(a, block, reinterpret_cast<float*>(memory));
  });
}

void forward(
    Tensor x, std::optional<Tensor> residual, std::optional<Tensor> weight, std::optional<Tensor> bias, bool one_plus,
    double eps, Tensor y, std::optional<Tensor> z, std::optional<Tensor> mean, Tensor rstd) {
  STD_TORCH_CHECK(residual.has_value() == z.has_value(), "norm: `z` belongs to `residual`");
  Norm a{};
  a.format = format_of(x, "norm", "x");
  a.x = rows_of(x, "x", x, false);
  a.rows = x.size(0);
  a.width = x.size(1);
  a.x_row = x.stride(0);
  if (residual) {
    a.residual = rows_of(*residual, "residual", x, false);
    a.residual_row = residual->stride(0);
    a.z = rows_of(*z, "z", x, true);
  }
  a.y = rows_of(y, "y", x, true);
  a.weight = vector_of(weight, "weight", a.width);
  a.bias = vector_of(bias, "bias", a.width);
  a.centred = mean.has_value();
  a.mean = vector_of(mean, "mean", a.rows);
  a.rstd = vector_of(rstd, "rstd", a.rows);
  a.one_plus = one_plus;
  a.eps = static_cast<float>(eps);
  run(a, norm_kernels().forward);
}

void backward(
    Tensor dy, std::optional<Tensor> dz, Tensor z, std::optional<Tensor> weight, std::optional<Tensor> mean, Tensor rstd,
    bool one_plus, Tensor dx, std::optional<Tensor> dweight, std::optional<Tensor> dbias) {
  Norm a{};
  a.format = format_of(z, "norm", "z");
  a.x = rows_of(z, "z", z, false);
  a.rows = z.size(0);
  a.width = z.size(1);
  a.x_row = z.stride(0);
  a.dy = rows_of(dy, "dy", z, true);
  a.dz = dz ? rows_of(*dz, "dz", z, true) : nullptr;
  a.dx = rows_of(dx, "dx", z, true);
  a.weight = vector_of(weight, "weight", a.width);
  a.centred = mean.has_value();
  a.mean = vector_of(mean, "mean", a.rows);
  a.rstd = vector_of(rstd, "rstd", a.rows);
  a.one_plus = one_plus;
  const int64_t blocks = vlmo_kernels::norm_blocks(a.rows);
  const auto weights = floats(dweight ? blocks * a.width : 0), biases = floats(dbias ? blocks * a.width : 0);
  a.dweight = dweight ? weights.get() : nullptr;
  a.dbias = dbias ? biases.get() : nullptr;
  run(a, norm_kernels().backward);
  if (dweight) add_up(a.dweight, blocks, a.width, vector_of(*dweight, "dweight", a.width));
  if (dbias) add_up(a.dbias, blocks, a.width, vector_of(*dbias, "dbias", a.width));
}

Tensor column_sums(Tensor x) {
  STD_TORCH_CHECK(x.dim() == 2, "column_sums: `x` must be [R, N], got ", x.dim(), " dimensions");
  vlmo_kernels::Sums a{format_of(x, "column_sums", "x"), x.size(0), x.size(1), x.stride(0), rows_of(x, "x", x, false), nullptr};
  const int64_t sizes[] = {a.width}, blocks = vlmo_kernels::norm_blocks(a.rows);
  const Tensor out = torch::stable::new_empty(x, {sizes, 1}, std::make_optional(ScalarType::Float));
  const auto parts = floats(blocks * a.width);
  a.parts = parts.get();
  const auto& kernel = norm_kernels();
  vlmo_kernels::run_tasks(blocks, 0, [&](int64_t block, char*) { kernel.sum_block(a, block); });
  add_up(a.parts, blocks, a.width, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmo_kernels_cpu, m) {
  m.def(
      "norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, bool one_plus, float eps, Tensor(a!) y, "
      "Tensor(b!)? z, Tensor(c!)? mean, Tensor(d!) rstd) -> ()");
  m.def(
      "norm_backward(Tensor dy, Tensor? dz, Tensor z, Tensor? weight, Tensor? mean, Tensor rstd, bool one_plus, "
      "Tensor(a!) dx, Tensor(b!)? dweight, Tensor(c!)? dbias) -> ()");
  m.def("column_sums(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vlmo_kernels_cpu, CPU, m) {
  m.impl("norm_forward", TORCH_BOX(&forward));
  m.impl("norm_backward", TORCH_BOX(&backward));
  m.impl("column_sums", TORCH_BOX(&column_sums));
}
