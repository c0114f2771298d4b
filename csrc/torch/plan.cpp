// vlmo_kernels_cpu::plan: the device planner's source, run by the CPU.
#include "plan.h"

namespace {

using vlmo_kernels::Tensor;
namespace device_plan = vlmo_kernels::device_plan;

vlmo_kernels::PlanTables plan(Tensor ids, std::optional<Tensor> mask, int64_t modalities) {
  return vlmo_kernels::plan(ids, mask, modalities, [](const auto& in, int32_t* workspace, const auto& out) {
    const auto count = [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) device_plan::count_on_cpu(in, static_cast<int>(block), workspace);
    };
    const auto fill = [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) device_plan::fill_on_cpu(in, static_cast<int>(b), workspace, out);
    };
    // A block takes about 20 microseconds; waking a thread on a busy machine takes milliseconds.
    constexpr int64_t blocks_of_a_thread = 256;
    torch::stable::parallel_for(0, in.blocks(), blocks_of_a_thread, count);
    torch::stable::parallel_for(0, in.blocks(), blocks_of_a_thread, fill);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmo_kernels_cpu, m) { m.def(vlmo_kernels::kPlanSchema); }

STABLE_TORCH_LIBRARY_IMPL(vlmo_kernels_cpu, CPU, m) { m.impl("plan", TORCH_BOX(&plan)); }
