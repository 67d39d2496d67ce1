// What the library computes, for one instruction set. Each isa_*.cpp compiles the same templates (rows.h, attention.h, linear.h,
// linear_int8.h, repack.h, sampling.h) for its own set and fills one table; library.cpp picks the table. No header here may define a
// function with linkage: one that was compiled for AVX-512 could otherwise be the one that an older CPU runs.
#pragma once

#include <stdint.h>

enum Dtype { FLOAT32, BFLOAT16, FLOAT16, NUM_DTYPES };

// residual += x, then residual / rms(residual) · weight → normed; all [rows, dim]. Where residual is null, x / rms(x) · weight.
struct AddRmsNorm {
    const void* x;
    void* residual;
    const void* weight;
    void* normed;
    int64_t rows, dim;
    float eps;
};

// projected [tokens, heads + 2 · kv_heads, head_dim]: every query and key head normalized if weight [heads + kv_heads, head_dim] is
// given, then rotated by cos and signed_sin [tokens, head_dim]; queries go to queries [tokens, heads, head_dim], keys and values
// to their slots of the pool [num_blocks, kv_heads, 2, block_size, head_dim].
struct RotateAndStore {
    const void *projected, *weight, *cos, *signed_sin;
    const int64_t* slots;
    void *queries, *pool;
    int64_t tokens, heads, kv_heads, head_dim, block_size;
    float eps;
};

// [gate, up] [rows, 2 · width] → silu(gate) · up [rows, width].
struct SiluMul {
    const void* gate_up;
    void* out;
    int64_t rows, width;
};

// Causal attention of queries [tokens, heads, head_dim] over the pool; see disaggd.model.batch.Batch for the three tables.
struct Attend {
    const void *queries, *pool;
    void* out;
    const int32_t *query_start, *context_lens, *block_tables;
    int64_t sequences, table_stride, heads, kv_heads, head_dim, block_size;
    int64_t window;  // attend to the last so many positions only; 0: to all
    float scale;  // of scores, for powers of 2
};

// x [rows, inputs] · weightᵀ + bias (or null) → out [rows, outputs]; the weight as `pack` left it.
struct Linear {
    const void *x, *packed, *bias;
    void* out;
    int64_t rows, inputs, outputs;
};

// The same by a weight of 8 bits; see linear_int8.h.
struct LinearInt8 {
    const void *x, *packed, *bias;
    void* out;
    int64_t rows, inputs, outputs;
};

// A token for each of `rows` rows of logits, `stride` floats apart; see disaggd.kernels.draws.Draws for the six arrays [rows]. All of
// them are null for the best of every row.
struct Sample {
    const float* logits;
    int64_t* tokens;
    int64_t rows, vocab_size, stride;
    const float* temperatures;
    const int32_t* top_k;
    const float *top_p, *floors;
    const int64_t *seeds, *positions;
};

// Random words → their noise, and the bounds by which most of it is never worked out. For tests; count: a multiple of 16.
struct Noise {
    const uint32_t* words;
    float *noise, *bounds;
    int64_t count;
};

// A projection of a decoder's layer; bias may be null.
struct Projection {
    const void *packed, *bias;
    int64_t inputs, outputs;
};

struct DecoderLayer {
    const void *attention_norm, *head_norm, *mlp_norm;  // head_norm: null, or as RotateAndStore has it
    Projection qkv, out, gate_up, down;
};

// Some layers over the `rows` new tokens of `sequences` sequences: residual [rows, hidden] in place, to which `before`, what the layer
// before these computed, is still to be added (null: there is none); what the last layer adds to it → x. The pool's layers lie
// `layer_bytes` apart; the rest is as in RotateAndStore and Attend. intermediate: a multiple of 64.
struct Decode {
    const DecoderLayer* layers;
    const void* before;
    void *residual, *x;
    const void *cos, *signed_sin;
    const int64_t* slots;
    void* pool;
    const int32_t *query_start, *context_lens, *block_tables;
    int64_t num_layers, layer_bytes, int8_weights, rows, sequences, table_stride, heads, kv_heads, head_dim, block_size, window;
    float scale, eps;
};

// `tokens` tokens, the first of which is the `start`-th of block blocks[0], of `heads` heads in each of `layers` layers, from the pool's
// blocks [heads, 2, source_size, head_dim], `block_stride` elements apart, into out [layers, ⌈tokens / target_size⌉, heads, 2, target_size,
// head_dim]: zero where there is no token. `pool` is where block 0 has the first of the heads, in the first of the layers.
struct Repack {
    const void* pool;
    const int64_t* blocks;
    void* out;
    int64_t layer_stride, block_stride, layers, heads, source_size, target_size, head_dim, start, tokens;
};

// Blocks landed[i] of wire [layers, wire_blocks, heads, 16 + 2 · block_size · head_dim] bytes (see disaggd.kernels.fp8) → blocks[i] of
// pool [layers, pool_blocks, heads, 2, block_size, head_dim].
struct UnpackFp8 {
    const void* wire;
    void* pool;
    const int64_t *landed, *blocks;
    int64_t count, layers, wire_blocks, pool_blocks, heads, block_size, head_dim;
};

struct Kernels {
    void (*add_rms_norm[NUM_DTYPES])(const AddRmsNorm&);
    void (*rotate_and_store[NUM_DTYPES])(const RotateAndStore&);
    void (*silu_mul[NUM_DTYPES])(const SiluMul&);
    void (*attend[NUM_DTYPES])(const Attend&);
    void (*linear[NUM_DTYPES])(const Linear&);  // float16 is null
    void (*linear_int8[NUM_DTYPES])(const LinearInt8&);  // bfloat16 is null where the set does not multiply it in pairs; float16 always
    void (*decode[NUM_DTYPES])(const Decode&);  // null where `linear` is
    void (*sample)(const Sample&);
    void (*noise)(const Noise&);
    void (*repack[NUM_DTYPES][NUM_DTYPES])(const Repack&);  // from, to
    void (*repack_fp8[NUM_DTYPES])(const Repack&);
    void (*unpack_fp8[NUM_DTYPES])(const UnpackFp8&);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512, kernels_avx512_bf16;

// Runs job(context, 0 … count − 1), each once, on as many threads as torch would use; in no order. What a job computes may not
// depend on the thread that runs it.
typedef void (*Job)(const void* context, int64_t item);
void parallel(int64_t count, Job job, const void* context);

// The threads of one parallel region, which all call `each` alike, one stretch of work after another: to meet costs them a fraction of
// what a region of OpenMP's costs.
struct Team {
    // Runs job(context, 0 … count − 1), each once; returns when all are done. As for `parallel`, but each thread passes its own context.
    void each(int64_t count, Job job, const void* context);

    void meet();

    int size;
    alignas(64) int64_t next;
    alignas(64) int arrived;
    alignas(64) int turn;  // how often all have met
    int sleepers;
};

// Runs work(team, context) on all the threads of a new team, this one among them.
void together(void (*work)(Team&, const void* context), const void* context);

// At least so many bytes, aligned to 64, of the calling thread; what they hold is lost at the thread's next call for the same use.
enum ScratchUse { JOBS, TILE, MULTIPLIED, ACTIVATIONS, CANDIDATES, NUM_SCRATCH_USES };
void* scratch(ScratchUse use, int64_t bytes);
