// Launches of the device planner. No CUDA header, so that the registration with torch compiles without nvcc.
#pragma once

#include "vlmo_kernels/device_plan.h"

namespace vlmo_kernels {
namespace cuda {

// Two launches on `stream` (a cudaStream_t). workspace: [in.blocks(), in.columns()]. Returns a cudaError_t.
int launch_plan(
    const device_plan::Input<std::int64_t>& in, std::int32_t* workspace, const Tables& out, void* stream);
int launch_plan(
    const device_plan::Input<std::int32_t>& in, std::int32_t* workspace, const Tables& out, void* stream);

}  // namespace cuda
}  // namespace vlmo_kernels
