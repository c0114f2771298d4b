#define VLMO_LEVEL avx512
#include "vlmo_kernels/attention_level.h"
