#define VLMO_LEVEL avx2
#include "vlmo_kernels/dense_level.h"
