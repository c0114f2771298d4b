#define VLMO_LEVEL avx512bf16
#include "vlmo_kernels/attention_level.h"
