// The C interface that native.py calls, the choice of instruction set, and threads. Compiled for any x86-64.
//
// Threads are torch's own: GOMP_parallel of the OpenMP runtime that torch has loaded, so that one team of threads does all the
// work. Two runtimes would each keep threads spinning on the same cores.
#include <stdlib.h>

#include "kernels.h"

extern "C" {
void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags) __attribute__((weak));
int omp_get_max_threads() __attribute__((weak));
int omp_in_parallel() __attribute__((weak));
}

namespace {

struct Shared {
    int64_t count;
    Job job;
    const void* context;
    int64_t next;
};

void take_turns(void* data) {
    Shared* shared = (Shared*)data;
    for (int64_t item; (item = __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED)) < shared->count;) shared->job(shared->context, item);
}

struct Buffer {
    void* start = nullptr;
    int64_t bytes = 0;
    ~Buffer() { free(start); }
};

thread_local Buffer buffers[NUM_SCRATCH_USES];

const Kernels* const TABLES[] = {&kernels_baseline, &kernels_avx2, &kernels_avx512, &kernels_avx512_bf16};

}  // namespace

void parallel(int64_t count, Job job, const void* context) {
    Shared shared{count, job, context, 0};
    if (count > 1 && GOMP_parallel && omp_get_max_threads && omp_get_max_threads() > 1 && !omp_in_parallel())
        GOMP_parallel(take_turns, &shared, 0, 0);
    else
        take_turns(&shared);
}

void* scratch(ScratchUse use, int64_t bytes) {
    Buffer& buffer = buffers[use];
    if (buffer.bytes < bytes) {
        free(buffer.start);
        buffer.bytes = (bytes + bytes / 2 + 63) / 64 * 64;
        buffer.start = aligned_alloc(64, buffer.bytes);
        if (!buffer.start) abort();
    }
    return buffer.start;
}

extern "C" {
#pragma GCC visibility push(default)

// 0: any x86-64, 1: AVX2, 2: AVX-512, 3: AVX-512 with bfloat16 pairs.
int disaggd_best_isa() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    return !avx512 ? 1 : __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}

void disaggd_add_rms_norm(int isa, int dtype, const void* x, void* residual, const void* weight, void* normed, int64_t rows,
                          int64_t dim, float eps) {
    TABLES[isa]->add_rms_norm[dtype]({x, residual, weight, normed, rows, dim, eps});
}

void disaggd_rotate_and_store(int isa, int dtype, const void* projected, const void* weight, const void* cos, const void* signed_sin,
                          const int64_t* slots, void* queries, void* pool, int64_t tokens, int64_t heads, int64_t kv_heads,
                          int64_t head_dim, int64_t block_size, float eps) {
    TABLES[isa]->rotate_and_store[dtype](
        {projected, weight, cos, signed_sin, slots, queries, pool, tokens, heads, kv_heads, head_dim, block_size, eps});
}

void disaggd_silu_mul(int isa, int dtype, const void* gate_up, void* out, int64_t rows, int64_t width) {
    TABLES[isa]->silu_mul[dtype]({gate_up, out, rows, width});
}

void disaggd_attend(int isa, int dtype, const void* queries, const void* pool, void* out, const int32_t* query_start,
                    const int32_t* context_lens, const int32_t* block_tables, int64_t sequences, int64_t table_stride, int64_t heads,
                    int64_t kv_heads, int64_t head_dim, int64_t block_size, int64_t window, float scale) {
    TABLES[isa]->attend[dtype]({queries, pool, out, query_start, context_lens, block_tables, sequences, table_stride, heads, kv_heads,
                                head_dim, block_size, window, scale * 1.44269504f});
}

void disaggd_linear(int isa, const void* x, const void* packed, const void* bias, void* out, int64_t rows, int64_t inputs, int64_t outputs) {
    TABLES[isa]->linear({x, packed, bias, out, rows, inputs, outputs});
}

void disaggd_linear_int8(int isa, int dtype, const void* x, const void* packed, const void* bias, void* out, int64_t rows, int64_t inputs,
                         int64_t outputs) {
    TABLES[isa]->linear_int8[dtype]({x, packed, bias, out, rows, inputs, outputs});
}

void disaggd_sample(int isa, const float* logits, int64_t* tokens, int64_t rows, int64_t vocab_size, int64_t stride,
                    const float* temperatures, const int32_t* top_k, const float* top_p, const float* floors, const int64_t* seeds,
                    const int64_t* positions) {
    TABLES[isa]->sample({logits, tokens, rows, vocab_size, stride, temperatures, top_k, top_p, floors, seeds, positions});
}

void disaggd_noise(int isa, const uint32_t* words, float* noise, float* bounds, int64_t count) {
    TABLES[isa]->noise({words, noise, bounds, count});
}

#pragma GCC visibility pop
}
