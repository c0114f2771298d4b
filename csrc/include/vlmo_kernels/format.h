// The number formats of buffers.
#pragma once

namespace vlmo_kernels {

enum Format { FP32, BF16, FP16 };

}  // namespace vlmo_kernels
