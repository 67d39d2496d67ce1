// Projections of bfloat16 by pairs. The weight is packed [outputs / PANEL][inputs / 2][PANEL][2], so that one panel is one stream
// of memory, and every output is summed over its inputs in one order, whatever the number of rows.
#pragma once

#include "product.h"

namespace {

#if BF16_PAIRS

constexpr int64_t BLOCK_ROWS = 192;  // rows of x that meet a panel while it is near: 192 · 1,024 inputs are 0.4 MB of a 1 MB L2

// Steps of 256 bytes of the weight, fetched ahead by hand where several rows keep the processor too busy to look far itself: a tenth
// faster for 8 rows; for 1 it would be a tenth slower.
template <int rows> constexpr int AHEAD = rows > 2 ? 48 : 0;

template <int n> INLINE void linear_rows(const Linear& l, const bf16* x, const Step* panel, const bf16* bias, bf16* out) {
    F sums[n][VECTORS] = {};
    multiply<true, AHEAD<n>>(sums, (const Step*)x, l.inputs / 2, panel, l.inputs / 2);
    UNROLL for (int i = 0; i < n; i++)
        UNROLL for (int v = 0; v < VECTORS; v++)
            store(out + i * l.outputs + v * W, bias ? sums[i][v] + load(bias + v * W) : sums[i][v]);
}

INLINE void linear_panel(const Linear& l, int64_t column, int64_t first, int64_t end) {
    const bf16* bias = l.bias ? (const bf16*)l.bias + column : nullptr;
    const Step* panel = (const Step*)l.packed + column * (l.inputs / 2);
    for (int64_t row = first; row < end; row += ROWS)
        with_rows(end - row < ROWS ? end - row : ROWS, [&](auto n) {
            linear_rows<n.value>(l, (const bf16*)l.x + row * l.inputs, panel, bias, (bf16*)l.out + row * l.outputs + column);
        });
}

void linear(const Linear& l) {
    const int64_t panels = l.outputs / PANEL, blocks = (l.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    parallel(panels * blocks, [](const void* context, int64_t item) {
        const Linear& l = *(const Linear*)context;
        const int64_t first = item / (l.outputs / PANEL) * BLOCK_ROWS, end = first + BLOCK_ROWS;
        linear_panel(l, item % (l.outputs / PANEL) * PANEL, first, end < l.rows ? end : l.rows);
    }, &l);
}

#endif

}  // namespace
