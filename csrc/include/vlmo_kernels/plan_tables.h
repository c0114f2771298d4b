// The tables of a plan, as ModalityLayout holds them: int32, B samples, T rows, G groups, padded length N.
#pragma once

#include <cstdint>

namespace vlmo_kernels {

struct Tables {
  std::int32_t* cu_seqlens;     // [B + 1]
  std::int32_t* rows;           // [T]
  std::int32_t* positions;      // [T]
  std::int32_t* sample_of_row;  // [T]
  std::int32_t* group_offsets;  // [G + 1]
  std::int32_t* row_of_token;   // [B * N]
};

}  // namespace vlmo_kernels
