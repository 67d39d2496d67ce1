// Layers of a decoder over a few rows, in one parallel region: one new token of each sequence, or chunks of prompts beside them. The
// formulas, and every rounding between them, are those of the kernels that do one thing at a time, so a sequence goes on with the same
// bits by either way.
//
// A layer of 7 M parameters is read from memory in 0.2 ms by two threads; as six regions of OpenMP's and as many calls from Python it took
// half as long again.
#pragma once

#include "attention.h"
#include "linear.h"
#include "linear_int8.h"
#include "rows.h"

namespace {

// Memory between the layer's operations, all [rows, …]; shared by the team.
template <class T> struct Activations {
    T *normed, *projected, *queries, *attended, *gate_up, *mixed;

    explicit Activations(const Decode& d) {
        const DecoderLayer& layer = d.layers[0];
        const int64_t widths[] = {layer.qkv.inputs, layer.qkv.outputs, layer.out.inputs, layer.out.inputs, layer.gate_up.outputs, layer.down.inputs};
        T** parts[] = {&normed, &projected, &queries, &attended, &gate_up, &mixed};
        int64_t sizes[6], total = 0;
        for (int i = 0; i < 6; i++) total += sizes[i] = (d.rows * widths[i] + 31) / 32 * 32;
        T* at = (T*)scratch(ACTIVATIONS, total * sizeof(T));
        for (int i = 0; i < 6; at += sizes[i++]) *parts[i] = at;
    }
};

// What one thread of the team does; all do the same.
template <class T> struct Decoder {
    Team& team;
    const Decode& d;
    const Activations<T>& to;
    const AttendJobs<T>& jobs;

    // Each of a projection's panels is an item.
    template <class Panel> struct Panels {
        const Decoder& decoder;
        const Projection& projection;
        Panel panel;
        const void* x;
        void* out;
        const Step* multiplied;

        INLINE_MEMBER void compute(int64_t column) const {
            const Projection& p = projection;
            const int64_t rows = decoder.d.rows;
            if (decoder.d.int8_weights) {
                if constexpr (sizeof(T) == 4 || in_pairs<T>) Int8Item<T>({x, p.packed, p.bias, out, rows, p.inputs, p.outputs}, column, 0, rows).compute();
                return;
            }
            LinearItem<T>{{x, p.packed, p.bias, out, rows, p.inputs, p.outputs}, multiplied, column / LINEAR_PANEL, 0, rows}.compute();
        }
    };

    INLINE_MEMBER int64_t panel() const { return d.int8_weights ? PANEL : LINEAR_PANEL; }

    // Calls compute(item) on the Panels of a projection, `count` times in all.
    template <class Compute> INLINE_MEMBER void project(const Projection& p, const T* x, T* out, int64_t count, Compute compute) const {
        Step* const room = d.int8_weights ? nullptr : (Step*)scratch(MULTIPLIED, d.rows * p.inputs * sizeof(Step));
        const Panels<Compute> panels{*this, p, compute, x, out, d.int8_weights ? nullptr : as_multiplied<T>(x, 0, d.rows, p.inputs, room)};
        team.each(count, [](const void* context, int64_t item) {
            const Panels<Compute>& panels = *(const Panels<Compute>*)context;
            panels.panel(panels, item);
        }, &panels);
    }

    INLINE_MEMBER void linear(const Projection& p, const T* x, T* out) const {
        project(p, x, out, (p.outputs + panel() - 1) / panel(),
                [](const auto& panels, int64_t item) { panels.compute(item * panels.decoder.panel()); });
    }

    // A panel of the gate and its panel of `up`, and what they are for.
    INLINE_MEMBER void linear_silu_mul(const Projection& p, const T* x) const {
        project(p, x, to.gate_up, p.outputs / 2 / panel(), [](const auto& panels, int64_t item) {
            const Decoder& decoder = panels.decoder;
            const int64_t width = panels.projection.outputs / 2, column = item * decoder.panel();
            panels.compute(column);
            panels.compute(width + column);
            for (int64_t row = 0; row < decoder.d.rows; row++) {
                const T* gate = (const T*)panels.out + row * 2 * width + column;
                T* const to = decoder.to.mixed + row * width + column;
                for (int64_t i = 0; i < decoder.panel(); i += W) store(to + i, silu(load(gate + i)) * load(gate + width + i));
            }
        });
    }

    template <class Args, void (*run)(const Args&, int64_t, int64_t)> INLINE_MEMBER void each_row(const Args& args) const {
        team.each(d.rows, [](const void* context, int64_t row) { run(*(const Args*)context, row, row + 1); }, &args);
    }

    INLINE_MEMBER void norm(const void* x, const void* weight, int64_t dim) const {
        // Where there is no x yet, the residual is normalized as it is.
        each_row<AddRmsNorm, add_rms_norm_rows<T>>({x ? x : d.residual, x ? d.residual : nullptr, weight, to.normed, d.rows, dim, d.eps});
    }

    void layer(const DecoderLayer& layer, const void* x, void* pool, Attend attention) const {
        const int64_t hidden = layer.qkv.inputs;
        norm(x, layer.attention_norm, hidden);
        linear(layer.qkv, to.normed, to.projected);
        each_row<RotateAndStore, rotate_and_store_rows<T>>({to.projected, layer.head_norm, d.cos, d.signed_sin, d.slots, to.queries, pool, d.rows,
                                                           d.heads, d.kv_heads, d.head_dim, d.block_size, d.eps});
        attention.pool = pool;
        struct Attending {
            const AttendJobs<T>& jobs;
            const Attend& a;
        } attending{jobs, attention};
        team.each(jobs.count, [](const void* context, int64_t item) {
            const Attending& attending = *(const Attending*)context;
            attending.jobs.run(attending.a, item);
        }, &attending);
        linear(layer.out, to.attended, (T*)d.x);
        norm(d.x, layer.mlp_norm, hidden);
        linear_silu_mul(layer.gate_up, to.normed);
        linear(layer.down, to.mixed, (T*)d.x);
    }
};

template <class T> void decode(const Decode& d) {
    const Activations<T> to(d);
    const Attend attention{to.queries, nullptr, to.attended, d.query_start, d.context_lens, d.block_tables, d.sequences, d.table_stride,
                           d.heads, d.kv_heads, d.head_dim, d.block_size, d.window, d.scale};
    struct Shared {
        const Decode& d;
        const Activations<T>& to;
        const Attend& attention;
        AttendJobs<T> jobs;
    } shared{d, to, attention, AttendJobs<T>(attention)};
    together([](Team& team, const void* context) {
        const Shared& s = *(const Shared*)context;
        const Decoder<T> decoder{team, s.d, s.to, s.jobs};
        for (int64_t index = 0; index < s.d.num_layers; index++)
            decoder.layer(s.d.layers[index], index ? s.d.x : s.d.before, (char*)s.d.pool + index * s.d.layer_bytes, s.attention);
    }, &shared);
}

}  // namespace
