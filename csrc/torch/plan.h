// What the CPU and the CUDA registration of the planner share: checks, outputs, the type of the ids.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <tuple>

#include "vlmo_kernels/device_plan.h"

namespace vlmo_kernels {

using torch::stable::Tensor;
using PlanTables = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
constexpr const char* kPlanSchema =
    "plan(Tensor ids, Tensor? mask, int modalities) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";

// launch(device_plan::Input<Id>, int32_t* workspace, Tables) computes the tables.
template <typename Launch>
PlanTables plan(const Tensor& ids, const std::optional<Tensor>& mask, int64_t modalities, Launch launch) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(ids.dim() == 2, "plan: `ids` must be [B, N], got ", ids.dim(), " dimensions");
  const bool narrow = ids.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(narrow || ids.scalar_type() == ScalarType::Long, "plan: `ids` must be int32 or int64");
  STD_TORCH_CHECK(
      modalities >= 1 && modalities <= device_plan::kMaxModalities, "plan: `modalities` must be 1 to ",
      device_plan::kMaxModalities, ", got ", modalities);
  const int64_t batch = ids.size(0), length = ids.size(1), most = std::numeric_limits<int32_t>::max() - 1;
  STD_TORCH_CHECK(
      batch <= most && length <= most && (length == 0 || batch <= most / length),
      "plan: B * N must be below 2^31 - 1, got ", batch, " x ", length);
  if (mask) {
    STD_TORCH_CHECK(
        mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == batch &&
            mask->size(1) == length && mask->get_device_index() == ids.get_device_index(),
        "plan: `mask` must be bool, of the shape and on the device of `ids`");
  }

  const int64_t columns = 2 * modalities + 1;
  const auto table = [&](int64_t size) {
    const int64_t sizes[] = {size};
    return torch::stable::new_empty(ids, {sizes, 1}, std::make_optional(ScalarType::Int));
  };
  PlanTables out{table(batch + 1), table(batch * length), table(batch * length), table(batch * length),
                 table(columns),   table(batch * length)};
  const auto data = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  const Tables tables{data(std::get<0>(out)), data(std::get<1>(out)), data(std::get<2>(out)),
                                   data(std::get<3>(out)), data(std::get<4>(out)), data(std::get<5>(out))};
  const auto run = [&](auto id) {
    using Id = decltype(id);
    device_plan::Input<Id> in{};
    in.ids = static_cast<const Id*>(ids.const_data_ptr());
    in.mask = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
    for (int d = 0; d < 2; ++d) {
      in.ids_strides[d] = ids.stride(d);
      in.mask_strides[d] = mask ? mask->stride(d) : 0;
    }
    in.batch = static_cast<int32_t>(batch);
    in.length = static_cast<int32_t>(length);
    in.modalities = static_cast<int32_t>(modalities);
    const Tensor workspace = table(in.blocks() * columns);
    launch(in, data(workspace), tables);
  };
  narrow ? run(int32_t{}) : run(int64_t{});
  return out;
}

}  // namespace vlmo_kernels
