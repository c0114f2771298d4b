// vlmo_kernels_cuda::plan: the device planner on the current stream, without waiting for it.
#include "../cuda/plan.h"

#include "plan.h"

namespace {

using vlmo_kernels::Tensor;

vlmo_kernels::PlanTables plan(Tensor ids, std::optional<Tensor> mask, int64_t modalities) {
  const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(ids.get_device_index(), &stream));
  return vlmo_kernels::plan(ids, mask, modalities, [&](const auto& in, int32_t* workspace, const auto& out) {
    const int error = vlmo_kernels::cuda::launch_plan(in, workspace, out, stream);
    STD_TORCH_CHECK(error == 0, "plan: the launch failed with CUDA error ", error);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(vlmo_kernels_cuda, m) { m.def(vlmo_kernels::kPlanSchema); }

STABLE_TORCH_LIBRARY_IMPL(vlmo_kernels_cuda, CUDA, m) { m.impl("plan", TORCH_BOX(&plan)); }
