// What every x86-64 has: SSE2.
#define WIDTH 4
#define BF16_PAIRS 0
#include "table.h"

const Kernels kernels_baseline = TABLE;
