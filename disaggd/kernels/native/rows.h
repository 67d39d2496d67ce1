// The operations that stream over rows: norms, rotation into the pool, SiLU.
#pragma once

#include "simd.h"

namespace {

// Rows enough for a job to be worth handing to a thread: 16,384 elements are some 4 µs, waking a thread is 2.
constexpr int64_t JOB_ELEMENTS = 16384;

template <class Args, void (*run)(const Args&, int64_t, int64_t)> INLINE void parallel_rows(const Args& args, int64_t rows, int64_t width) {
    struct Split {
        const Args& args;
        int64_t rows, each;
    } split{args, rows, 1 + JOB_ELEMENTS / width};
    parallel((rows + split.each - 1) / split.each, [](const void* context, int64_t item) {
        const Split& s = *(const Split*)context;
        int64_t first = item * s.each, end = first + s.each;
        run(s.args, first, end < s.rows ? end : s.rows);
    }, &split);
}

// ── RMSNorm, with the residual's addition ──

// Σ x², of x + residual where there is a residual, which becomes that sum: rounded to T before it is squared, for the norm is of
// what the residual stream holds.
template <class T> INLINE float sum_of_squares(const T* x, T* residual, int64_t dim) {
    F squares = {};
    each_vector(dim, [&](int64_t i) {
        if (residual) store(residual + i, load(x + i) + load(residual + i));
        F v = load((residual ? residual : x) + i);
        squares = squares + v * v;
    }, [&](int64_t i, int64_t part) {
        if (residual) store_part(residual + i, load_part(x + i, part) + load_part(residual + i, part), part);
        F v = load_part((residual ? residual : x) + i, part);
        squares = squares + v * v;
    });
    return sum(squares);
}

template <class T> INLINE void scale_row(const T* x, F factor, const T* weight, T* to, int64_t dim) {
    each_vector(dim, [&](int64_t i) { store(to + i, load(x + i) * factor * load(weight + i)); },
                [&](int64_t i, int64_t part) { store_part(to + i, load_part(x + i, part) * factor * load_part(weight + i, part), part); });
}

template <class T> void add_rms_norm_rows(const AddRmsNorm& a, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
        const T* x = (const T*)a.x + row * a.dim;
        T* residual = a.residual ? (T*)a.residual + row * a.dim : nullptr;
        F factor = broadcast(1.0f / sqrtf(sum_of_squares(x, residual, a.dim) / a.dim + a.eps));
        scale_row(residual ? residual : x, factor, (const T*)a.weight, (T*)a.normed + row * a.dim, a.dim);
    }
}

template <class T> void add_rms_norm(const AddRmsNorm& a) { parallel_rows<AddRmsNorm, add_rms_norm_rows<T>>(a, a.rows, a.dim); }

// ── norm and rotation of heads, keys and values into the pool ──

// y1 = x1·cos − x2·sin, y2 = x2·cos + x1·sin for the halves x1, x2 of x / rms(x) · weight; the minus is in `signed_sin`.
template <class T> INLINE void rotate_head(const T* x, const T* weight, const T* cos, const T* signed_sin, T* to, int64_t dim, float eps) {
    F factor = broadcast(weight ? 1.0f / sqrtf(sum_of_squares<T>(x, nullptr, dim) / dim + eps) : 1.0f);
    int64_t half = dim / 2;
    auto turn = [&](int64_t i, auto get, auto put) {
        F first = get(x + i), second = get(x + half + i);
        if (weight) {
            first = first * factor * get(weight + i);
            second = second * factor * get(weight + half + i);
        }
        put(to + i, first * get(cos + i) + second * get(signed_sin + i));
        put(to + half + i, second * get(cos + half + i) + first * get(signed_sin + half + i));
    };
    each_vector(half, [&](int64_t i) { turn(i, [](const T* p) { return load(p); }, [](T* p, F v) { store(p, v); }); },
                [&](int64_t i, int64_t part) {
                    turn(i, [part](const T* p) { return load_part(p, part); }, [part](T* p, F v) { store_part(p, v, part); });
                });
}

template <class T> void rotate_and_store_rows(const RotateAndStore& a, int64_t first, int64_t end) {
    const int64_t dim = a.head_dim, in_block = a.block_size * dim;
    for (int64_t token = first; token < end; token++) {
        const T* x = (const T*)a.projected + token * (a.heads + 2 * a.kv_heads) * dim;
        const T *cos = (const T*)a.cos + token * dim, *sin = (const T*)a.signed_sin + token * dim, *weight = (const T*)a.weight;
        T* queries = (T*)a.queries + token * a.heads * dim;
        for (int64_t head = 0; head < a.heads; head++)
            rotate_head(x + head * dim, weight ? weight + head * dim : nullptr, cos, sin, queries + head * dim, dim, a.eps);
        T* slot = (T*)a.pool + a.slots[token] / a.block_size * 2 * a.kv_heads * in_block + a.slots[token] % a.block_size * dim;
        for (int64_t head = 0; head < a.kv_heads; head++) {
            int64_t key = a.heads + head, value = key + a.kv_heads;
            T* to = slot + 2 * head * in_block;
            rotate_head(x + key * dim, weight ? weight + key * dim : nullptr, cos, sin, to, dim, a.eps);
            memcpy(to + in_block, x + value * dim, dim * sizeof(T));
        }
    }
}

template <class T> void rotate_and_store(const RotateAndStore& a) {
    parallel_rows<RotateAndStore, rotate_and_store_rows<T>>(a, a.tokens, (a.heads + 2 * a.kv_heads) * a.head_dim);
}

// ── SiLU ──

INLINE F silu(F x) {
    F exponent = x * -LOG2_E;
    return x / (1.0f + exp2(exponent < broadcast(127.0f) ? exponent : broadcast(127.0f)));
}

template <class T> void silu_mul_rows(const SiluMul& a, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
        const T *gate = (const T*)a.gate_up + row * 2 * a.width, *up = gate + a.width;
        T* to = (T*)a.out + row * a.width;
        each_vector(a.width, [&](int64_t i) { store(to + i, silu(load(gate + i)) * load(up + i)); },
                    [&](int64_t i, int64_t part) { store_part(to + i, silu(load_part(gate + i, part)) * load_part(up + i, part), part); });
    }
}

template <class T> void silu_mul(const SiluMul& a) { parallel_rows<SiluMul, silu_mul_rows<T>>(a, a.rows, a.width); }

}  // namespace
