// AVX2 with FMA and F16C: Intel since 2013, AMD since 2015.
#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define WIDTH 8
#define BF16_PAIRS 0
#include "table.h"

const Kernels kernels_avx2 = TABLE;
#if defined(__clang__)
#pragma clang attribute pop
#endif
