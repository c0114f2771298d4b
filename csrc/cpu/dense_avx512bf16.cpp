#define VLMO_LEVEL avx512bf16
#include "vlmo_kernels/dense_level.h"
