// Projections by weights of 8 bits: output j of a row is scale[j] · Σ x[i] · q[j][i] + bias[j], q in −127 … 127. Every q is exact in
// bfloat16 as in float32, so the sums are those of a weight q in x's own type; the scale comes last.
//
// A weight is packed in panels of INT8_PANEL outputs, whatever the instruction set: their scales as float32, then
// [inputs / PER_STEP][INT8_PANEL][PER_STEP]; the last panel is padded. Every output is summed over its inputs in one order,
// whatever the number of rows.
#pragma once

#include "product.h"

namespace {

constexpr int64_t INT8_PANEL = 64;
constexpr int64_t SCALE_BYTES = INT8_PANEL * sizeof(float);
template <class T> constexpr int64_t STEP_BYTES = INT8_PANEL * PER_STEP<T>;

constexpr int64_t INT8_AHEAD = 8192;     // bytes of a weight, fetched ahead by hand: a tenth faster for 1 row
constexpr int64_t FEW_ROWS = 4 * ROWS;   // so few expand the weight in registers, once for every ROWS of them: a quarter faster for 8
constexpr int64_t INT8_BLOCK_ROWS = 192; // more share what was expanded, up to so many
constexpr int64_t EXPANDED_STEPS = 128;  // at a time: 32 KB of the L1 cache; with half as many the sums come and go too often

// W outputs of one step as the product reads them.
template <class T> INLINE F expand(const int8_t* q) {
#if BF16_PAIRS
    if constexpr (in_pairs<T>) return (F)_mm512_cvtne2ps_pbh((__m512)load(q + W), (__m512)load(q));
#endif
    return load(q);
}

template <class T> INLINE void fetch_ahead(const int8_t* q) {
    UNROLL for (int byte = 0; byte < STEP_BYTES<T>; byte += 64) __builtin_prefetch(q + INT8_AHEAD + byte);
}

// One item of work: some rows by the PANEL outputs from `column` on.
template <class T> struct Int8Item {
    const LinearInt8& l;
    int64_t column, first, end;
    int64_t steps;        // in a row
    const float* scales;  // of the outputs from `column` on, as is q
    const int8_t* q;

    INLINE_MEMBER Int8Item(const LinearInt8& l, int64_t column, int64_t first, int64_t end)
        : l(l), column(column), first(first), end(end), steps(l.inputs / PER_STEP<T>) {
        const int64_t within = column % INT8_PANEL;
        const char* panel = (const char*)l.packed + column / INT8_PANEL * (SCALE_BYTES + steps * STEP_BYTES<T>);
        scales = (const float*)panel + within;
        q = (const int8_t*)panel + SCALE_BYTES + within * PER_STEP<T>;
    }

    INLINE_MEMBER const Step* x(int64_t row) const { return (const Step*)((const T*)l.x + row * l.inputs); }

    template <int n> INLINE_MEMBER void finish(int64_t row, const F (&sums)[n][VECTORS]) const {
        UNROLL for (int v = 0; v < VECTORS; v++) {
            const int64_t output = column + v * W, left = l.outputs - output;
            if (left <= 0) return;
            const F scale = load(scales + v * W);
            const T* bias = (const T*)l.bias + output;
            const F offset = !l.bias ? F{} : left < W ? load_part(bias, left) : load(bias);
            UNROLL for (int i = 0; i < n; i++) {
                T* out = (T*)l.out + (row + i) * l.outputs + output;
                const F value = sums[i][v] * scale + offset;
                left < W ? store_part(out, value, left) : store(out, value);
            }
        }
    }

    // In registers: n rows' sums, and a vector of weights at a time.
    template <int n> INLINE_MEMBER void in_registers(int64_t row) const {
        F sums[n][VECTORS] = {};
        const int8_t* from = q;
        for (int64_t step = 0; step < steps; step++, from += STEP_BYTES<T>) {
            fetch_ahead<T>(from);
            UNROLL for (int v = 0; v < VECTORS; v++) {
                const F columns = expand<T>(from + v * W * PER_STEP<T>);
                UNROLL for (int i = 0; i < n; i++) sums[i][v] = multiply_add<in_pairs<T>>(sums[i][v], x(row + i)[step], columns);
            }
        }
        finish(row, sums);
    }

    // The rows' products with the steps from `start` on, which lie expanded; sums come from `partial` [n][PANEL] and go there, but for
    // the first and the last steps.
    template <int n> INLINE_MEMBER void add_products(int64_t row, int64_t start, int64_t count, const Step* expanded, float* partial) const {
        F sums[n][VECTORS];
        UNROLL for (int i = 0; i < n; i++)
            UNROLL for (int v = 0; v < VECTORS; v++) sums[i][v] = start ? load(partial + i * PANEL + v * W) : F{};
        multiply<in_pairs<T>>(sums, x(row) + start, steps, expanded, count);
        if (start + count == steps) return finish(row, sums);
        UNROLL for (int i = 0; i < n; i++)
            UNROLL for (int v = 0; v < VECTORS; v++) store(partial + i * PANEL + v * W, sums[i][v]);
    }

    INLINE_MEMBER void expand_steps(int64_t start, int64_t count, Step* to) const {
        const int8_t* from = q + start * STEP_BYTES<T>;
        for (int64_t step = 0; step < count; step++, from += STEP_BYTES<T>, to += PANEL) {
            fetch_ahead<T>(from);
            UNROLL for (int v = 0; v < VECTORS; v++) store_bits(to + v * W, expand<T>(from + v * W * PER_STEP<T>));
        }
    }

    // Calls run(row, their number as a type) for the rows, ROWS at a time.
    template <class Run> INLINE_MEMBER void each_rows(Run run) const {
        for (int64_t row = first; row < end; row += ROWS)
            with_rows(end - row < ROWS ? end - row : ROWS, [&](auto n) { run(row, n); });
    }

    INLINE_MEMBER void compute() const {
        if (end - first <= FEW_ROWS) return each_rows([&](int64_t row, auto n) { in_registers<n.value>(row); });
        Step* const expanded = (Step*)scratch(TILE, (EXPANDED_STEPS + end - first) * PANEL * sizeof(Step));
        float* const partials = (float*)(expanded + EXPANDED_STEPS * PANEL);
        for (int64_t start = 0; start < steps; start += EXPANDED_STEPS) {
            const int64_t count = steps - start < EXPANDED_STEPS ? steps - start : EXPANDED_STEPS;
            expand_steps(start, count, expanded);
            each_rows([&](int64_t row, auto n) {
                add_products<n.value>(row, start, count, expanded, partials + (row - first) * PANEL);
            });
        }
    }
};

// float32 on every instruction set; bfloat16 where it is multiplied in pairs, and then `inputs` must be even.
template <class T> void linear_int8(const LinearInt8& l) {
    const int64_t panels = (l.outputs + PANEL - 1) / PANEL, blocks = (l.rows + INT8_BLOCK_ROWS - 1) / INT8_BLOCK_ROWS;
    parallel(panels * blocks, [](const void* context, int64_t item) {
        const LinearInt8& l = *(const LinearInt8*)context;
        const int64_t panels = (l.outputs + PANEL - 1) / PANEL, first = item / panels * INT8_BLOCK_ROWS, end = first + INT8_BLOCK_ROWS;
        Int8Item<T>(l, item % panels * PANEL, first, end < l.rows ? end : l.rows).compute();
    }, &l);
}

}  // namespace
