// AVX-512 with products of bfloat16 pairs: Intel since 2020, AMD since 2022.
#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
#define WIDTH 16
#define BF16_PAIRS 1
#include "table.h"

const Kernels kernels_avx512_bf16 = TABLE;
#if defined(__clang__)
#pragma clang attribute pop
#endif
