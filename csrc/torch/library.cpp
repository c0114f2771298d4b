// The namespace of the compiled CPU ops. Every op registers itself in a file of its own, as a fragment of it.
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "vlmo_kernels/cpu_isa.h"

namespace {

int64_t isa() { return static_cast<int64_t>(vlmo_kernels::isa()); }

}  // namespace

STABLE_TORCH_LIBRARY(vlmo_kernels_cpu, m) { m.def("isa() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(vlmo_kernels_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
