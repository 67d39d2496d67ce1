// The product that attention and projections are made of: a few rows of A by one panel of B, B's columns in lanes.
#pragma once

#include "simd.h"

namespace {

// What a lane multiplies at a time: one float32, or two bfloat16 that are added to one float32 (vdpbf16ps). Both have 4 bytes, so
// one layout serves: A is [rows][steps], B [panels][steps][PANEL] of them.
typedef uint32_t Step;

constexpr int VECTORS = W == 16 ? 4 : 2;
constexpr int PANEL = VECTORS * W;  // columns
constexpr int ROWS = 6;             // · VECTORS accumulators: 24 of AVX-512's 32 registers, 12 of the others' 16

template <class T> constexpr bool in_pairs = false;
#if BF16_PAIRS
template <> constexpr bool in_pairs<bf16> = true;
#endif
template <class T> constexpr int PER_STEP = in_pairs<T> ? 2 : 1;

template <bool pairs> INLINE F multiply_add(F sum, Step a, F b) {
#if BF16_PAIRS
    if constexpr (pairs) return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#endif
    return sum + (F)(U{} + a) * b;
}

// sums[rows][VECTORS] += A · B, in order of the steps whatever the number of rows. Fetches B so many steps ahead.
template <bool pairs, int ahead = 0, int rows> INLINE void multiply(F (&sums)[rows][VECTORS], const Step* a, int64_t a_stride, const Step* b, int64_t steps) {
    for (int64_t step = 0; step < steps; step++, b += PANEL) {
        if constexpr (ahead > 0)
            UNROLL for (int v = 0; v < VECTORS; v++) __builtin_prefetch(b + ahead * PANEL + v * W);
        F columns[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) columns[v] = load_bits<F>(b + v * W);
        UNROLL for (int row = 0; row < rows; row++)
            UNROLL for (int v = 0; v < VECTORS; v++)
                sums[row][v] = multiply_add<pairs>(sums[row][v], a[row * a_stride + step], columns[v]);
    }
}

// Calls run with the number of rows, 1 to ROWS, as a type.
template <int n> struct Count { static constexpr int value = n; };
template <int n = ROWS, class Run> INLINE void with_rows(int64_t rows, Run run) {
    if constexpr (n > 1)
        if (rows < n) return with_rows<n - 1>(rows, run);
    run(Count<n>());
}

// Elements of T as steps, `count` of them (padded with 0 to whole steps).
template <class T> INLINE void to_steps(const T* from, int64_t count, Step* to) {
    if constexpr (in_pairs<T>) {
        memcpy(to, from, count * sizeof(T));
        if (count % 2) ((T*)to)[count] = T{};
    } else {
        each_vector(count, [&](int64_t i) { store_bits(to + i, load(from + i)); },
                    [&](int64_t i, int64_t part) { store_part((float*)to + i, load_part(from + i, part), part); });
    }
}

}  // namespace
