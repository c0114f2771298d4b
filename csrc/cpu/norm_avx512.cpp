#define VLMO_LEVEL avx512
#include "vlmo_kernels/norm_level.h"
