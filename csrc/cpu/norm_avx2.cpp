#define VLMO_LEVEL avx2
#include "vlmo_kernels/norm_level.h"
