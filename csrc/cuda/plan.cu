// The device planner on the GPU; the algorithm is in device_plan.h.
#include "plan.h"

namespace vlmo_kernels {
namespace {

using namespace device_plan;

template <typename Id>
__global__ void __launch_bounds__(kThreads) count_kernel(Input<Id> in, std::int32_t* workspace) {
  __shared__ Shared shared;
  const Block<Id> b{in, shared, static_cast<int>(blockIdx.x)};
  const int t = threadIdx.x;
  b.count_stretch(t);
  __syncthreads();
  b.sum_lanes(t);
  __syncthreads();
  b.store_sizes(t, workspace);
}

template <typename Id>
__global__ void __launch_bounds__(kThreads) fill_kernel(Input<Id> in, const std::int32_t* workspace, Tables out) {
  __shared__ Shared shared;
  const Block<Id> b{in, shared, static_cast<int>(blockIdx.x)};
  const int t = threadIdx.x;
  b.count_stretch(t);
  __syncthreads();
  b.sum_lanes(t);
  b.sum_stripe(t, workspace);
  __syncthreads();
  b.sum_stripes(t);
  __syncthreads();
  b.place_samples(t, out);
  __syncthreads();
  b.fill(t, out);
}

template <typename Id>
int launch(const Input<Id>& in, std::int32_t* workspace, const Tables& out, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  count_kernel<<<in.blocks(), kThreads, 0, s>>>(in, workspace);
  fill_kernel<<<in.blocks(), kThreads, 0, s>>>(in, workspace, out);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

namespace cuda {

int launch_plan(const Input<std::int64_t>& in, std::int32_t* workspace, const Tables& out, void* stream) {
  return launch(in, workspace, out, stream);
}

int launch_plan(const Input<std::int32_t>& in, std::int32_t* workspace, const Tables& out, void* stream) {
  return launch(in, workspace, out, stream);
}

}  // namespace cuda
}  // namespace vlmo_kernels
