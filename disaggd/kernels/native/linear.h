// Projections. A weight is packed [outputs / LINEAR_PANEL][inputs / per step][LINEAR_PANEL] in steps of 4 bytes, whatever the instruction
// set: one float32, or two bfloat16 that belong to one output. So one panel is one stream of memory. Every output is summed over its
// inputs in one order, whatever the number of rows.
//
// Where bfloat16 is not multiplied in pairs, a pair is two float32 by a shift and a mask: exact, and in registers, for memory is what
// few rows wait for. x is made float32 once, before.
#pragma once

#include "product.h"

namespace {

constexpr int64_t LINEAR_PANEL = 64;
constexpr int64_t BLOCK_ROWS = 192;     // rows of x that meet a panel while it is near: 192 · 1,024 inputs are 0.4 MB of a 1 MB L2
constexpr int64_t SPLIT_ROWS = 64;      // more rows than these share what was split into float32: for fewer it is up to a fifth slower
constexpr int64_t SPLIT_INPUTS = W == 16 ? 128 : 256;  // at a time, of PANEL outputs: 16 or 32 KB of the L1 cache
constexpr int64_t NEAR_STEPS = 64;      // steps of all of a panel that few rows go over together: 16 KB

// Steps of 256 bytes of the weight, fetched ahead by hand where several rows keep the processor too busy to look far itself: a tenth
// faster for 8 rows; for 1 it would be a tenth slower.
template <int rows> constexpr int AHEAD = rows > 2 ? 48 : 0;

// Inputs of T to a step of the weight, and the steps of a row as it is multiplied.
template <class T> constexpr int PER_PACKED = 4 / sizeof(T);
template <class T> INLINE int64_t row_steps(int64_t inputs) { return inputs / PER_STEP<T>; }

// Vectors of outputs that go over the inputs together, so that sums and columns stay in registers.
template <int rows> constexpr int TOGETHER = W == 16 ? 4 : rows == 1 ? 8 : rows <= 3 ? 4 : 2;

INLINE F first_of_pair(U pairs) { return (F)(pairs << 16); }
INLINE F second_of_pair(U pairs) { return (F)(pairs & 0xffff0000u); }

template <int rows, int vectors> INLINE void add_products_of(F (&sums)[rows][vectors], const Step* x, int64_t x_stride, const F (&columns)[vectors]) {
    UNROLL for (int row = 0; row < rows; row++)
        UNROLL for (int v = 0; v < vectors; v++) sums[row][v] = multiply_add<false>(sums[row][v], x[row * x_stride], columns[v]);
}

// sums[rows][vectors] += rows of x, as float32, · columns of a packed weight whose bfloat16 are not multiplied in pairs. All the firsts,
// then all the seconds: else the sums of 6 rows do not stay in 16 registers.
template <bool fetch, int rows, int vectors>
INLINE void multiply_split(F (&sums)[rows][vectors], const Step* x, int64_t x_stride, const Step* packed, int64_t steps) {
    for (int64_t step = 0; step < steps; step++, packed += LINEAR_PANEL, x += 2) {
        if constexpr (fetch)  // what comes next of the whole panel: the other outputs' lines, too
            UNROLL for (int line = 0; line < LINEAR_PANEL; line += 16) __builtin_prefetch(packed + NEAR_STEPS * LINEAR_PANEL + line);
        F columns[vectors];
        UNROLL for (int v = 0; v < vectors; v++) columns[v] = first_of_pair(load_bits<U>(packed + v * W));
        add_products_of(sums, x, x_stride, columns);
        UNROLL for (int v = 0; v < vectors; v++) columns[v] = second_of_pair(load_bits<U>(packed + v * W));
        add_products_of(sums, x + 1, x_stride, columns);
    }
}

// The same where a step is multiplied as it lies.
template <class T, int ahead, int rows, int vectors>
INLINE void multiply_packed(F (&sums)[rows][vectors], const Step* x, int64_t x_stride, const Step* packed, int64_t steps) {
    for (int64_t step = 0; step < steps; step++, packed += LINEAR_PANEL) {
        if constexpr (ahead > 0)
            UNROLL for (int line = 0; line < LINEAR_PANEL; line += 16) __builtin_prefetch(packed + ahead * LINEAR_PANEL + line);
        F columns[vectors];
        UNROLL for (int v = 0; v < vectors; v++) columns[v] = load_bits<F>(packed + v * W);
        UNROLL for (int row = 0; row < rows; row++)
            UNROLL for (int v = 0; v < vectors; v++)
                sums[row][v] = multiply_add<in_pairs<T>>(sums[row][v], x[row * x_stride + step], columns[v]);
    }
}

// One item of work: rows first … end − 1 by one panel. `x` [rows][row_steps] as they are multiplied.
template <class T> struct LinearItem {
    static constexpr bool is_split = sizeof(T) == 2 && !in_pairs<T>;
    const Linear& l;
    const Step* x;
    int64_t panel, first, end;

    INLINE_MEMBER int64_t stride() const { return row_steps<T>(l.inputs); }
    INLINE_MEMBER int64_t packed_steps() const { return l.inputs / PER_PACKED<T>; }
    INLINE_MEMBER const Step* packed() const { return (const Step*)l.packed + panel * LINEAR_PANEL * packed_steps(); }

    // Sums of rows from `row` on, `column` columns into the panel.
    template <int n, int vectors> INLINE_MEMBER void finish(int64_t row, int64_t column, const F (&sums)[n][vectors]) const {
        const int64_t output = panel * LINEAR_PANEL + column;
        const T* bias = (const T*)l.bias + output;
        T* out = (T*)l.out + row * l.outputs + output;
        UNROLL for (int i = 0; i < n; i++)
            UNROLL for (int v = 0; v < vectors; v++)
                store(out + i * l.outputs + v * W, l.bias ? sums[i][v] + load(bias + v * W) : sums[i][v]);
    }

    template <int n> INLINE_MEMBER void in_registers(int64_t row) const {
        F sums[n][VECTORS] = {};
        multiply_packed<T, AHEAD<n>>(sums, x + row * stride(), stride(), packed(), stride());
        finish(row, 0, sums);
    }

    // The rows' products with `count` steps from `start` on, some columns at a time; sums come from `partial` [n][LINEAR_PANEL] and go
    // there, but for the first and the last steps.
    template <bool fetch, int n> INLINE_MEMBER void add_near(int64_t row, int64_t column, int64_t start, int64_t count, float* partial) const {
        F sums[n][TOGETHER<n>];
        UNROLL for (int i = 0; i < n; i++)
            UNROLL for (int v = 0; v < TOGETHER<n>; v++) sums[i][v] = start ? load(partial + i * LINEAR_PANEL + column + v * W) : F{};
        const Step* columns = packed() + start * LINEAR_PANEL + column;
        if constexpr (is_split)
            multiply_split<fetch>(sums, x + row * stride() + 2 * start, stride(), columns, count);
        else
            multiply_packed<T, fetch ? NEAR_STEPS : 0>(sums, x + row * stride() + start, stride(), columns, count);
        if (start + count == packed_steps()) return finish(row, column, sums);
        UNROLL for (int i = 0; i < n; i++)
            UNROLL for (int v = 0; v < TOGETHER<n>; v++) store(partial + i * LINEAR_PANEL + column + v * W, sums[i][v]);
    }

    INLINE_MEMBER void near_rows() const {
        float* const partials = (float*)scratch(TILE, (end - first) * LINEAR_PANEL * sizeof(float));
        for (int64_t start = 0, steps = packed_steps(); start < steps; start += NEAR_STEPS) {
            const int64_t count = steps - start < NEAR_STEPS ? steps - start : NEAR_STEPS;
            each_rows([&](int64_t row, auto n) {
                constexpr int columns = TOGETHER<n.value> * W;
                float* const partial = partials + (row - first) * LINEAR_PANEL;
                if (row == first)
                    add_near<true, n.value>(row, 0, start, count, partial);
                else
                    add_near<false, n.value>(row, 0, start, count, partial);
                for (int64_t column = columns; column < LINEAR_PANEL; column += columns) add_near<false, n.value>(row, column, start, count, partial);
            });
        }
    }

    // The rows' products with `count` inputs from `start` on, which lie split; sums come from `partial` [n][PANEL] and go there, but for
    // the first and the last inputs.
    template <int n> INLINE_MEMBER void add_products(int64_t row, int64_t column, int64_t start, int64_t count, const Step* columns, float* partial) const {
        F sums[n][VECTORS];
        UNROLL for (int i = 0; i < n; i++)
            UNROLL for (int v = 0; v < VECTORS; v++) sums[i][v] = start ? load(partial + i * PANEL + v * W) : F{};
        multiply<false>(sums, x + row * stride() + start, stride(), columns, count);
        if (start + count == l.inputs) return finish(row, column, sums);
        UNROLL for (int i = 0; i < n; i++)
            UNROLL for (int v = 0; v < VECTORS; v++) store(partial + i * PANEL + v * W, sums[i][v]);
    }

    INLINE_MEMBER void split(int64_t column, int64_t start, int64_t count, Step* to) const {
        const Step* from = packed() + start / 2 * LINEAR_PANEL + column;
        for (int64_t i = 0; i < count; i += 2, from += LINEAR_PANEL, to += 2 * PANEL)
            UNROLL for (int v = 0; v < VECTORS; v++) {
                const U pairs = load_bits<U>(from + v * W);
                store_bits(to + v * W, first_of_pair(pairs));
                store_bits(to + PANEL + v * W, second_of_pair(pairs));
            }
    }

    // Calls run(row, their number as a type) for the rows, ROWS at a time.
    template <class Run> INLINE_MEMBER void each_rows(Run run) const {
        for (int64_t row = first; row < end; row += ROWS)
            with_rows(end - row < ROWS ? end - row : ROWS, [&](auto n) { run(row, n); });
    }

    INLINE_MEMBER void split_once() const {
        Step* const columns = (Step*)scratch(TILE, (SPLIT_INPUTS + end - first) * PANEL * sizeof(Step));
        float* const partials = (float*)(columns + SPLIT_INPUTS * PANEL);
        for (int64_t column = 0; column < LINEAR_PANEL; column += PANEL)
            for (int64_t start = 0; start < l.inputs; start += SPLIT_INPUTS) {
                const int64_t count = l.inputs - start < SPLIT_INPUTS ? l.inputs - start : SPLIT_INPUTS;
                split(column, start, count, columns);
                each_rows([&](int64_t row, auto n) {
                    add_products<n.value>(row, column, start, count, columns, partials + (row - first) * PANEL);
                });
            }
    }

    INLINE_MEMBER void compute() const {
        if constexpr (is_split) {
            if (end - first > SPLIT_ROWS) return split_once();
        } else if constexpr (VECTORS * W == LINEAR_PANEL) {
            return each_rows([&](int64_t row, auto n) { in_registers<n.value>(row); });
        }
        near_rows();
    }
};

// `rows` rows of x as they are multiplied: where they lie, or in `room`, which has place for them as float32.
template <class T> INLINE const Step* as_multiplied(const void* x, int64_t first, int64_t end, int64_t inputs, Step* room) {
    if constexpr (!LinearItem<T>::is_split) return (const Step*)x;
    for (int64_t row = first; row < end; row++) to_steps((const T*)x + row * inputs, inputs, room + row * inputs);
    return room;
}

template <class T> void linear(const Linear& l) {
    struct Shared {
        const Linear& l;
        Step* x;
    } shared{l, (Step*)l.x};
    if constexpr (LinearItem<T>::is_split) {
        shared.x = (Step*)scratch(MULTIPLIED, l.rows * l.inputs * sizeof(Step));
        const int64_t block = 16;
        parallel((l.rows + block - 1) / block, [](const void* context, int64_t item) {
            const Shared& s = *(const Shared*)context;
            const int64_t first = item * block, end = first + block;
            as_multiplied<T>(s.l.x, first, end < s.l.rows ? end : s.l.rows, s.l.inputs, s.x);
        }, &shared);
    }
    const int64_t panels = l.outputs / LINEAR_PANEL, blocks = (l.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    parallel(panels * blocks, [](const void* context, int64_t item) {
        const Shared& s = *(const Shared*)context;
        const int64_t panels = s.l.outputs / LINEAR_PANEL, first = item / panels * BLOCK_ROWS, end = first + BLOCK_ROWS;
        LinearItem<T>{s.l, s.x, item % panels, first, end < s.l.rows ? end : s.l.rows}.compute();
    }, &shared);
}

}  // namespace
