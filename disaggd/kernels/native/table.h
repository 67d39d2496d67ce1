// One instruction set's table. Included last by an isa_*.cpp, which has set WIDTH and BF16_PAIRS and the compiler's target.
#pragma once

#include "attention.h"
#include "decoder.h"
#include "linear.h"
#include "linear_int8.h"
#include "repack.h"
#include "rows.h"
#include "sampling.h"

#define EACH_DTYPE(f) {f<float>, f<bf16>, f<f16>}
#define LINEAR {linear<float>, linear<bf16>, nullptr}
#define DECODE {decode<float>, decode<bf16>, nullptr}
#if BF16_PAIRS
#define LINEAR_INT8 {linear_int8<float>, linear_int8<bf16>, nullptr}
#else
#define LINEAR_INT8 {linear_int8<float>, nullptr, nullptr}
#endif
#define REPACK(from) {repack<from, float>, repack<from, bf16>, repack<from, f16>}
#define REPACKS {REPACK(float), REPACK(bf16), REPACK(f16)}
#define TABLE \
    {EACH_DTYPE(add_rms_norm), EACH_DTYPE(rotate_and_store), EACH_DTYPE(silu_mul), EACH_DTYPE(attend), LINEAR, LINEAR_INT8, DECODE, \
     sample, noise, REPACKS, EACH_DTYPE(repack_fp8), EACH_DTYPE(unpack_fp8)}
