// The C interface that native.py calls, the choice of instruction set, and threads. Compiled for any x86-64.
//
// Threads are torch's own: GOMP_parallel of the OpenMP runtime that torch has loaded, so that one team of threads does all the
// work. Two runtimes would each keep threads spinning on the same cores.
#include <immintrin.h>
#include <sched.h>
#include <stdlib.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

extern "C" {
void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags) __attribute__((weak));
int omp_get_max_threads() __attribute__((weak));
int omp_get_num_threads() __attribute__((weak));
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

struct Meeting {
    void (*work)(Team&, const void*);
    const void* context;
    Team team;
};

void take_part(void* data) {
    Meeting* meeting = (Meeting*)data;
    __atomic_store_n(&meeting->team.size, omp_get_num_threads ? omp_get_num_threads() : 1, __ATOMIC_RELAXED);  // all store the same
    meeting->work(meeting->team, meeting->context);
}

bool has_threads() { return GOMP_parallel && omp_get_max_threads && omp_get_max_threads() > 1 && !omp_in_parallel(); }

// Looks so often before it sleeps: some 20 to 40 µs, longer than an item of a small model, and short beside what a thread misses that was
// put off its processor. As often as OpenMP's threads do, see launch.py.
constexpr int LOOKS = 2000;

void sleep_while(int* word, int value) {
#if defined(__linux__)
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
    (void)word, (void)value;
    sched_yield();
#endif
}

void wake_all(int* word) {
#if defined(__linux__)
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, __INT_MAX__, nullptr, nullptr, 0);
#else
    (void)word;
#endif
}

thread_local Buffer buffers[NUM_SCRATCH_USES];

const Kernels* const TABLES[] = {&kernels_baseline, &kernels_avx2, &kernels_avx512, &kernels_avx512_bf16};

}  // namespace

void parallel(int64_t count, Job job, const void* context) {
    Shared shared{count, job, context, 0};
    if (count > 1 && has_threads())
        GOMP_parallel(take_turns, &shared, 0, 0);
    else
        take_turns(&shared);
}

void together(void (*work)(Team&, const void*), const void* context) {
    Meeting meeting{work, context, {1, 0, 0, 0, 0}};
    if (has_threads())
        GOMP_parallel(take_part, &meeting, 0, 0);
    else
        work(meeting.team, context);
}

void Team::each(int64_t count, Job job, const void* context) {
    for (int64_t item; (item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) job(context, item);
    meet();
}

void Team::meet() {
    const int now = __atomic_load_n(&turn, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == size) {
        arrived = 0;
        next = 0;
        __atomic_store_n(&turn, now + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&sleepers, __ATOMIC_SEQ_CST)) wake_all(&turn);
        return;
    }
    for (int look = 0; look < LOOKS; look++) {
        if (__atomic_load_n(&turn, __ATOMIC_ACQUIRE) != now) return;
        _mm_pause();
    }
    __atomic_add_fetch(&sleepers, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&turn, __ATOMIC_SEQ_CST) == now) sleep_while(&turn, now);
    __atomic_sub_fetch(&sleepers, 1, __ATOMIC_SEQ_CST);
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

// See native_sources.py.
const char* disaggd_sources() { return DISAGGD_SOURCES; }

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

void disaggd_linear(int isa, int dtype, const void* x, const void* packed, const void* bias, void* out, int64_t rows, int64_t inputs,
                    int64_t outputs) {
    TABLES[isa]->linear[dtype]({x, packed, bias, out, rows, inputs, outputs});
}

void disaggd_linear_int8(int isa, int dtype, const void* x, const void* packed, const void* bias, void* out, int64_t rows, int64_t inputs,
                         int64_t outputs) {
    TABLES[isa]->linear_int8[dtype]({x, packed, bias, out, rows, inputs, outputs});
}

void disaggd_decode(int isa, int dtype, const Decode* decode) {
    Decode scaled = *decode;
    scaled.scale *= 1.44269504f;
    TABLES[isa]->decode[dtype](scaled);
}

void disaggd_sample(int isa, const float* logits, int64_t* tokens, int64_t rows, int64_t vocab_size, int64_t stride,
                    const float* temperatures, const int32_t* top_k, const float* top_p, const float* floors, const int64_t* seeds,
                    const int64_t* positions) {
    TABLES[isa]->sample({logits, tokens, rows, vocab_size, stride, temperatures, top_k, top_p, floors, seeds, positions});
}

void disaggd_noise(int isa, const uint32_t* words, float* noise, float* bounds, int64_t count) {
    TABLES[isa]->noise({words, noise, bounds, count});
}

void disaggd_repack(int isa, int from, int to, const void* pool, const int64_t* blocks, void* out, int64_t layer_stride,
                    int64_t block_stride, int64_t layers, int64_t heads, int64_t source_size, int64_t target_size, int64_t head_dim,
                    int64_t start, int64_t tokens) {
    TABLES[isa]->repack[from][to](
        {pool, blocks, out, layer_stride, block_stride, layers, heads, source_size, target_size, head_dim, start, tokens});
}

void disaggd_repack_fp8(int isa, int from, const void* pool, const int64_t* blocks, void* out, int64_t layer_stride, int64_t block_stride,
                        int64_t layers, int64_t heads, int64_t source_size, int64_t target_size, int64_t head_dim, int64_t start,
                        int64_t tokens) {
    TABLES[isa]->repack_fp8[from](
        {pool, blocks, out, layer_stride, block_stride, layers, heads, source_size, target_size, head_dim, start, tokens});
}

void disaggd_unpack_fp8(int isa, int to, const void* wire, void* pool, const int64_t* landed, const int64_t* blocks, int64_t count,
                        int64_t layers, int64_t wire_blocks, int64_t pool_blocks, int64_t heads, int64_t block_size, int64_t head_dim) {
    TABLES[isa]->unpack_fp8[to]({wire, pool, landed, blocks, count, layers, wire_blocks, pool_blocks, heads, block_size, head_dim});
}

#pragma GCC visibility pop
}
