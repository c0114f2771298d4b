#define VLMO_LEVEL portable
#include "vlmo_kernels/norm_level.h"
