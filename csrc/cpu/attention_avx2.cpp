#define VLMO_LEVEL avx2
#include "vlmo_kernels/attention_level.h"
