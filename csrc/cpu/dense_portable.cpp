#define VLMO_LEVEL portable
#include "vlmo_kernels/dense_level.h"
