#define VLMO_LEVEL portable
#include "vlmo_kernels/attention_level.h"
