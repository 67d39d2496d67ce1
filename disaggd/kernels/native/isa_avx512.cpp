// AVX-512 as of 2017.
#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define WIDTH 16
#define BF16_PAIRS 0
#include "table.h"

const Kernels kernels_avx512 = TABLE;
#if defined(__clang__)
#pragma clang attribute pop
#endif
