#define VLMO_LEVEL avx512
#include "vlmo_kernels/dense_level.h"
