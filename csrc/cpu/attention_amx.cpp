#define VLMO_LEVEL amx
#include "vlmo_kernels/attention_level.h"
