// Attention over the paged pool. Two kernels: one for a single new token, which reads keys and values straight from the pool, once
// for all query heads that share them; one for more tokens, which packs tiles of them for `multiply`.
//
// Softmax goes by powers of 2: scores are scaled by log2(e), too.
//
// A row's result is the same bits whoever shares its batch and however many threads there are: contexts are cut at multiples of
// SPLIT or TILE_KEYS from their start, and the pieces are put together in order.
#pragma once

#include "product.h"

namespace {

template <class T> struct Context {
    const Attend& a;
    int64_t sequence;

    INLINE_MEMBER int64_t first_row() const { return a.query_start[sequence]; }
    INLINE_MEMBER int64_t num_new() const { return a.query_start[sequence + 1] - a.query_start[sequence]; }
    INLINE_MEMBER int64_t length() const { return a.context_lens[sequence]; }
    INLINE_MEMBER int64_t position(int64_t new_token) const { return length() - num_new() + new_token; }
    INLINE_MEMBER int64_t oldest(int64_t position) const { return a.window && position >= a.window ? position - a.window + 1 : 0; }

    // The key at a position; its value is `block_size · head_dim` further.
    INLINE_MEMBER const T* key(int64_t kv_head, int64_t position) const {
        int64_t block = a.block_tables[sequence * a.table_stride + position / a.block_size];
        return (const T*)a.pool + ((block * a.kv_heads + kv_head) * 2 * a.block_size + position % a.block_size) * a.head_dim;
    }
    INLINE_MEMBER const T* query(int64_t row, int64_t head) const { return (const T*)a.queries + (row * a.heads + head) * a.head_dim; }
    INLINE_MEMBER T* result(int64_t row, int64_t head) const { return (T*)a.out + (row * a.heads + head) * a.head_dim; }
};

// ── one new token ──

constexpr float LOWEST = -3.0e38f;  // below any score, and finite: −∞ − −∞ is no number

constexpr int SPLIT = 512;    // keys to a job: 128 KB to 256 KB of pool against 1 KB of partial results
constexpr int CHUNK = 64;     // keys whose scores are held: while they are taken their values are fetched, and then the next keys
constexpr int MAX_HEADS = 4;  // query heads that go over the keys together

// What a job leaves of one head: softmax over its keys, not yet divided, as `dim` floats, then the largest score and Σ 2^(s − largest).
INLINE int64_t partial_floats(int64_t dim) { return dim + 2; }

// Asks for a row of the pool: blocks lie scattered, and the hardware looks ahead within 4 KB only. Into the second cache: a Zen 4 core has
// more lines under way to there than to the first, and reads a long context in two thirds of the time.
template <class T> INLINE void fetch(const T* row, int64_t dim) {
    for (const char *line = (const char*)row, *end = (const char*)(row + dim); line < end; line += 64) __builtin_prefetch(line, 0, 2);
}

template <class T> INLINE F dot_step(F sum, const T* a, const T* b) {
#if BF16_PAIRS
    if constexpr (in_pairs<T>) return (F)_mm512_dpbf16_ps((__m512)sum, load_bits<__m512bh>(a), load_bits<__m512bh>(b));
#endif
    return sum + load(a) * load(b);
}

// The products of a query with W keys.
template <class T> INLINE F scores_of(const T* query, const T* const* keys, int64_t dim) {
    F sums[W] = {};
    for (int64_t i = 0; i < dim; i += W * PER_STEP<T>)
        UNROLL for (int key = 0; key < W; key++) sums[key] = dot_step(sums[key], query + i, keys[key] + i);
    return sum_each(sums);
}

// The softmax of one head as it goes over its keys; lanes are summed at the end.
struct Softmax {
    float peak;
    F weights;

    // Scores of `count` keys, those beyond it anything → 2^(score − peak), 0 beyond; as what `mix` multiplies. Returns what earlier
    // sums are worth under the new peak.
    template <class T> INLINE_MEMBER float take(float* scores, int64_t count, float scale, T* to) {
        F most = broadcast(peak);
        for (int64_t i = 0; i < CHUNK; i += W) {
            F v = lanes() + (int32_t)i < I{} + (int32_t)count ? load(scores + i) * scale : broadcast(-INFINITY);
            store(scores + i, v);
            most = maximum(most, v);
        }
        const float before = peak, decay = exp2(broadcast(before - (peak = max(most))))[0];
        weights = weights * decay;
        for (int64_t i = 0; i < CHUNK; i += W) {
            F v = exp2(load(scores + i) - peak);
            weights = weights + v;
            store(to + i, v);
        }
        return decay;
    }
};

// Weights of the keys of a chunk, by head: of bfloat16 where they are multiplied in pairs.
template <class T> struct Mixed { typedef float type; };
#if BF16_PAIRS
template <> struct Mixed<bf16> { typedef bf16 type; };
#endif

// to[head][columns] = decays[head] · to[head][columns] + Σ weights[head][key] · value[key][columns], for `vectors` vectors of columns;
// a value is `offset` beyond its key. Pairs are interleaved by halves of 128 bits: until `in_order`, `to` has its columns that way.
template <int heads, int vectors, class T>
INLINE void mix(const typename Mixed<T>::type (*weights)[CHUNK], const T* const* keys, int64_t offset, int64_t count, const float* decays,
                float* to, int64_t stride, const T* const* next, int64_t dim) {
    F sums[heads][vectors];
    UNROLL for (int head = 0; head < heads; head++)
        UNROLL for (int v = 0; v < vectors; v++) sums[head][v] = load(to + head * stride + v * W) * decays[head];
    for (int64_t key = 0; key < count; key += PER_STEP<T>) {
        if (next) {
            fetch(next[key], dim);
            if constexpr (in_pairs<T>) fetch(next[key + 1], dim);
        }
        UNROLL for (int v = 0; v < vectors; v += PER_STEP<T>) {
#if BF16_PAIRS
            if constexpr (in_pairs<T>) {
                const __m512i a = load_bits<__m512i>(keys[key] + offset + v * W), b = load_bits<__m512i>(keys[key + 1] + offset + v * W);
                const F low = (F)_mm512_unpacklo_epi16(a, b), high = (F)_mm512_unpackhi_epi16(a, b);
                UNROLL for (int head = 0; head < heads; head++) {
                    const Step pair = load_bits<Step>(weights[head] + key);
                    sums[head][v] = multiply_add<true>(sums[head][v], pair, low);
                    sums[head][v + 1] = multiply_add<true>(sums[head][v + 1], pair, high);
                }
                continue;
            }
#endif
            const F column = load(keys[key] + offset + v * W);
            UNROLL for (int head = 0; head < heads; head++) sums[head][v] = sums[head][v] + column * load_bits<float>(weights[head] + key);
        }
    }
    UNROLL for (int head = 0; head < heads; head++)
        UNROLL for (int v = 0; v < vectors; v++) store(to + head * stride + v * W, sums[head][v]);
}

// All columns from `column` on, as many at a time as stay in registers; fetches the next keys on the way.
template <int heads, int vectors, class T>
INLINE void mix_columns(int64_t column, const typename Mixed<T>::type (*weights)[CHUNK], const T* const* keys, int64_t to_value, int64_t count,
                        const float* decays, float* to, int64_t dim) {
    for (; column + vectors * W <= dim; column += vectors * W)
        mix<heads, vectors>(weights, keys, to_value + column, count, decays, to + column, partial_floats(dim), column ? nullptr : keys + CHUNK, dim);
    if constexpr (vectors > PER_STEP<T>)
        if (column < dim) mix_columns<heads, vectors / 2>(column, weights, keys, to_value, count, decays, to, dim);
}

template <class T> INLINE void in_order([[maybe_unused]] float* sums, [[maybe_unused]] int64_t dim) {
#if BF16_PAIRS
    if constexpr (in_pairs<T>)
        for (int64_t i = 0; i < dim; i += 2 * W) {
            const F low = load(sums + i), high = load(sums + i + W);
            store(sums + i, __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
            store(sums + i + W, __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
        }
#endif
}

// Query heads first … first + heads − 1 over `count` keys, of which the first chunk has `head_count`; results to to[heads][dim + 2].
template <int heads, class T>
void attend_keys(const T* query, const T* const* keys, int64_t to_value, int64_t head_count, int64_t count, float scale, int64_t dim, float* to) {
    constexpr int vectors = W == 16 ? (heads <= 3 ? 8 : 4) : (heads <= 2 ? 4 : 2);
    alignas(64) float scores[heads][CHUNK];
    alignas(64) typename Mixed<T>::type weights[heads][CHUNK];
    float decays[heads];
    Softmax softmax[heads];
    for (int head = 0; head < heads; head++) softmax[head] = {LOWEST, F{}};
    memset(to, 0, heads * partial_floats(dim) * sizeof(float));
    for (int64_t first = 0, now = head_count; first < count; first += now, now = count - first < CHUNK ? count - first : CHUNK) {
        for (int64_t i = 0; i < now; i += W) {
            for (int key = 0; key < W; key++) fetch(keys[first + i + key] + to_value, dim);
            for (int head = 0; head < heads; head++) store(scores[head] + i, scores_of(query + head * dim, keys + first + i, dim));
        }
        for (int head = 0; head < heads; head++) decays[head] = softmax[head].take(scores[head], now, scale, weights[head]);
        mix_columns<heads, vectors>(0, weights, keys + first, to_value, now, decays, to, dim);
    }
    for (int head = 0; head < heads; head++) {
        float* sums = to + head * partial_floats(dim);
        in_order<T>(sums, dim);
        sums[dim] = softmax[head].peak;
        sums[dim + 1] = sum(softmax[head].weights);
    }
}

template <class T> void decode_split(const Attend& a, int64_t sequence, int64_t kv_head, int64_t begin, int64_t end, float* to) {
    Context<T> context{a, sequence};
    const T* keys[SPLIT + 2 * CHUNK];
    const int64_t count = end - begin, group = a.heads / a.kv_heads, to_value = a.block_size * a.head_dim;
    const int64_t to_chunk = CHUNK - begin % CHUNK, head_count = to_chunk < count ? to_chunk : count;
    for (int64_t i = 0, left = 0; i < count; i++, left--) {
        if (!left || !i) left = a.block_size - (begin + i) % a.block_size;
        keys[i] = left == a.block_size || !i ? context.key(kv_head, begin + i) : keys[i - 1] + a.head_dim;
    }
    for (int64_t i = count; i < count + 2 * CHUNK; i++) keys[i] = keys[count - 1];
    const int64_t row = context.first_row();
    for (int64_t head = 0; head < group; head += MAX_HEADS) {
        const T* query = context.query(row, kv_head * group + head);
        float* part = to + head * partial_floats(a.head_dim);
        switch (group - head) {
            case 1: attend_keys<1>(query, keys, to_value, head_count, count, a.scale, a.head_dim, part); break;
            case 2: attend_keys<2>(query, keys, to_value, head_count, count, a.scale, a.head_dim, part); break;
            case 3: attend_keys<3>(query, keys, to_value, head_count, count, a.scale, a.head_dim, part); break;
            default: attend_keys<4>(query, keys, to_value, head_count, count, a.scale, a.head_dim, part);
        }
    }
}

// Puts the splits of one head together: Σ weight_i · 2^(peak_i − peak).
template <class T> void join_splits(float* parts, int64_t splits, int64_t stride, int64_t dim, T* to) {
    float peak = -INFINITY;
    for (int64_t i = 0; i < splits; i++) peak = parts[i * stride + dim] > peak ? parts[i * stride + dim] : peak;
    F weight = {};
    for (int64_t i = 0; i < splits; i++) weight = weight + exp2(broadcast(parts[i * stride + dim] - peak)) * parts[i * stride + dim + 1];
    for (int64_t column = 0; column < dim; column += W) {
        F sums = {};
        for (int64_t i = 0; i < splits; i++)
            sums = sums + exp2(broadcast(parts[i * stride + dim] - peak)) * load(parts + i * stride + column);
        store(to + column, sums / weight);
    }
}

// ── several new tokens ──

constexpr int TILE_KEYS = 256;
constexpr int TILE_ROWS = 252;  // rows (tokens · query heads of a KV head) that share packed keys: packing them is 4 % of the work

template <class T> struct Tile {
    const Attend& a;
    Context<T> context;
    int64_t kv_head, first_token, tokens;  // counted from the sequence's first new token
    int64_t group, rows, dim, steps, width;

    Step *queries, *keys, *values, *softened;  // [rows][steps], [panels][steps][PANEL], [panels][TILE_KEYS / per step][PANEL], [ROWS][…]
    float *sums, *scores, *peaks, *weights;    // [rows][width], [ROWS][TILE_KEYS], [rows], [rows]

    Tile(const Attend& a, int64_t sequence, int64_t kv_head, int64_t first_token, int64_t tokens)
        : a(a), context{a, sequence}, kv_head(kv_head), first_token(first_token), tokens(tokens), group(a.heads / a.kv_heads),
          rows(tokens * group), dim(a.head_dim), steps((dim + PER_STEP<T> - 1) / PER_STEP<T>), width((dim + PANEL - 1) / PANEL * PANEL) {
        int64_t sizes[] = {rows * steps, TILE_KEYS * steps, TILE_KEYS / PER_STEP<T> * width, ROWS * TILE_KEYS, rows * width, ROWS * TILE_KEYS, rows, rows};
        int64_t total = 0;
        for (int64_t& size : sizes) total += size = (size + 15) / 16 * 16;
        Step* base = (Step*)scratch(TILE, total * sizeof(Step));
        Step** parts[] = {&queries, &keys, &values, &softened, (Step**)&sums, (Step**)&scores, (Step**)&peaks, (Step**)&weights};
        for (int i = 0; i < 8; base += sizes[i++]) *parts[i] = base;
    }

    int64_t position(int64_t row) const { return context.position(first_token + row / group); }
    int64_t batch_row(int64_t row) const { return context.first_row() + first_token + row / group; }

    void run() {
        for (int64_t row = 0; row < rows; row++) {
            to_steps(context.query(batch_row(row), kv_head * group + row % group), dim, queries + row * steps);
            peaks[row] = LOWEST;
            weights[row] = 0;
        }
        memset(sums, 0, rows * width * sizeof(float));
        memset(values, 0, TILE_KEYS / PER_STEP<T> * width * sizeof(Step));
        const int64_t end = position(rows - 1) + 1;
        for (int64_t first = context.oldest(position(0)) / TILE_KEYS * TILE_KEYS; first < end; first += TILE_KEYS) {
            const int64_t count = end - first < TILE_KEYS ? end - first : TILE_KEYS;
            pack(first, count);
            for (int64_t row = 0; row < rows; row += ROWS) attend_rows(row, rows - row < ROWS ? rows - row : ROWS, first, count);
        }
        for (int64_t row = 0; row < rows; row++) {
            T* to = context.result(batch_row(row), kv_head * group + row % group);
            const float *from = sums + row * width, factor = 1.0f / weights[row];
            each_vector(dim, [&](int64_t i) { store(to + i, load(from + i) * factor); },
                        [&](int64_t i, int64_t part) { store_part(to + i, load_part(from + i, part) * factor, part); });
        }
    }

    // Keys transposed, values as they are, both zero beyond `count` and before the oldest that any row sees: what is not attended to
    // is not read, so a NaN that another left in a block stays there.
    void pack(int64_t first, int64_t count) {
        const int64_t oldest = context.oldest(position(0));
        const T* at[TILE_KEYS + W];
        for (int64_t i = 0; i < TILE_KEYS; i++) at[i] = i < count && first + i >= oldest ? context.key(kv_head, first + i) : nullptr;
        for (int64_t i = 0; i < (count + PANEL - 1) / PANEL * PANEL; i += W) {
            pack_keys(at + i, keys + i / PANEL * PANEL * steps + i % PANEL);
            for (int64_t j = 0; j < W; j += PER_STEP<T>) pack_values(at + i + j, values + (i + j) / PER_STEP<T> * PANEL);
        }
    }

    INLINE_MEMBER F steps_of(const T* key, int64_t step) const {  // W steps of a key, as far as it goes
        if (!key) return F{};
        const int64_t part = dim - step * PER_STEP<T>;
        if constexpr (in_pairs<T>) {
            if (part >= 2 * W) return load_bits<F>(key + 2 * step);
            F v = {};
            memcpy(&v, key + 2 * step, part * sizeof(T));
            return v;
        } else {
            return part >= W ? load(key + step) : load_part(key + step, part);
        }
    }

    void pack_keys(const T* const* at, Step* to) {
        for (int64_t step = 0; step < steps; step += W) {
            F v[W];
            UNROLL for (int key = 0; key < W; key++) v[key] = steps_of(at[key], step);
            transpose(v);
            const int64_t part = steps - step < W ? steps - step : W;
            for (int64_t i = 0; i < part; i++) store_bits(to + (step + i) * PANEL, v[i]);
        }
    }

    void pack_values(const T* const* at, Step* to) {
        const int64_t to_value = a.block_size * dim, panel_steps = TILE_KEYS / PER_STEP<T> * PANEL;
        for (int64_t i = 0; i < dim; i += W) {
            const int64_t part = dim - i < W ? dim - i : W;
            auto bits = [&](const T* key) { return !key ? F{} : part == W ? load(key + to_value + i) : load_part(key + to_value + i, part); };
            F v = bits(at[0]);
            if constexpr (in_pairs<T>) v = (F)((U)v >> 16 | (U)bits(at[1]));  // a bfloat16 is the upper half of its float32
            store_bits(to + i / PANEL * panel_steps + i % PANEL, v);
        }
    }

    void attend_rows(int64_t row, int64_t count, int64_t first_key, int64_t num_keys) {
        const int64_t from = position(row), to = position(row + count - 1);
        if (to < first_key || context.oldest(from) >= first_key + num_keys) return;
        const int64_t seen = to + 1 - first_key < num_keys ? to + 1 - first_key : num_keys;
        const int64_t columns = (seen + PANEL - 1) / PANEL * PANEL;
        with_rows(count, [&](auto n) { score<n.value>(row, columns); });
        if (from < first_key + columns - 1 || context.oldest(to) > first_key) hide(row, count, first_key, columns);
        float decays[ROWS];
        for (int64_t i = 0; i < count; i++) decays[i] = soften_row(row + i, scores + i * TILE_KEYS, softened + i * TILE_KEYS, columns);
        with_rows(count, [&](auto n) { mix_rows<n.value>(row, columns / PER_STEP<T>, decays); });
    }

    template <int n> void score(int64_t row, int64_t columns) {
        for (int64_t column = 0; column < columns; column += PANEL) {
            F tile[n][VECTORS] = {};
            multiply<in_pairs<T>>(tile, queries + row * steps, steps, keys + column * steps, steps);
            UNROLL for (int i = 0; i < n; i++)
                UNROLL for (int v = 0; v < VECTORS; v++) store(scores + i * TILE_KEYS + column + v * W, tile[i][v]);
        }
    }

    void hide(int64_t row, int64_t count, int64_t first_key, int64_t columns) {
        for (int64_t i = 0; i < count; i++) {
            const int64_t last = position(row + i) - first_key, oldest = context.oldest(position(row + i)) - first_key;
            float* of_row = scores + i * TILE_KEYS;
            for (int64_t column = 0; column < oldest && column < columns; column++) of_row[column] = -INFINITY;
            for (int64_t column = last < -1 ? 0 : last + 1; column < columns; column++) of_row[column] = -INFINITY;
        }
    }

    // 2^(score − peak) as steps; returns what earlier sums are worth under the new peak.
    INLINE_MEMBER float soften_row(int64_t row, const float* of_row, Step* to, int64_t columns) {
        F most = broadcast(-INFINITY);
        for (int64_t i = 0; i < columns; i += W) most = maximum(most, load(of_row + i));
        const float before = peaks[row], peak = max(maximum(most * a.scale, broadcast(before)));
        F total = {};
        for (int64_t i = 0; i < columns; i += W) {
            F v = exp2(load(of_row + i) * a.scale - peak);
            total = total + v;
            if constexpr (in_pairs<T>)
                store((T*)to + i, v);
            else
                store_bits(to + i, v);
        }
        const float decay = exp2(broadcast(before - peak))[0];
        weights[row] = weights[row] * decay + sum(total);
        peaks[row] = peak;
        return decay;
    }

    template <int n> void mix_rows(int64_t row, int64_t key_steps, const float* decays) {
        for (int64_t column = 0; column < width; column += PANEL) {
            float* to = sums + row * width + column;
            F tile[n][VECTORS];
            UNROLL for (int i = 0; i < n; i++)
                UNROLL for (int v = 0; v < VECTORS; v++) tile[i][v] = load(to + i * width + v * W) * decays[i];
            multiply<in_pairs<T>>(tile, softened, TILE_KEYS, values + column / PANEL * (TILE_KEYS / PER_STEP<T> * PANEL), key_steps);
            UNROLL for (int i = 0; i < n; i++)
                UNROLL for (int v = 0; v < VECTORS; v++) store(to + i * width + v * W, tile[i][v]);
        }
    }
};

// ── both ──

struct AttendJob {
    int64_t sequence, kv_head;
    int64_t begin, end;  // a decode's keys, or a chunk's tokens
    float* partial;      // [group][head_dim + 2]; null for a chunk
    AttendJob* first;    // of those of the same sequence and KV head, and of that one:
    int64_t splits, left;  // how many they are, and how many are still to be done
};

template <class T> INLINE bool decodes(const Attend& a, int64_t sequence) {
    return Context<T>{a, sequence}.num_new() == 1 && a.head_dim % (W * PER_STEP<T>) == 0;
}

// Calls add(begin, end) for each split of a decode, or for each tile of a chunk.
template <class T, class Add> INLINE void cut(const Attend& a, int64_t sequence, Add add) {
    Context<T> context{a, sequence};
    if (decodes<T>(a, sequence)) {
        for (int64_t begin = context.oldest(context.length() - 1), end; begin < context.length(); begin = end) {
            end = (begin / SPLIT + 1) * SPLIT;
            end = end < context.length() ? end : context.length();
            add(begin, end);
        }
        return;
    }
    const int64_t group = a.heads / a.kv_heads, tokens = TILE_ROWS > group ? TILE_ROWS / group : 1;
    for (int64_t end = context.num_new(); end > 0; end -= tokens) add(end > tokens ? end - tokens : 0, end);  // the longest first
}

// The work of one step, which is the same in every layer: cut once, in the calling thread's scratch.
template <class T> struct AttendJobs {
    int64_t count = 0, part;
    AttendJob* jobs;
    float* partials;

    explicit AttendJobs(const Attend& a) : part(a.heads / a.kv_heads * partial_floats(a.head_dim)) {
        int64_t room = 0;
        for (int64_t sequence = 0; sequence < a.sequences; sequence++) cut<T>(a, sequence, [&](int64_t, int64_t) { room += a.kv_heads; });
        jobs = (AttendJob*)scratch(JOBS, room * (sizeof(AttendJob) + part * sizeof(float)));
        partials = (float*)(jobs + room);
        for (int64_t sequence = a.sequences - 1; sequence >= 0; sequence--)  // chunks come behind decodes, and take longest
            for (int64_t head = 0; head < a.kv_heads; head++) {
                AttendJob* const first = jobs + count;
                cut<T>(a, sequence, [&](int64_t begin, int64_t end) {
                    jobs[count] = {sequence, head, begin, end, decodes<T>(a, sequence) ? partials + count * part : nullptr, first, 0, 0};
                    count++;
                });
                first->splits = first->left = jobs + count - first;
            }
    }

    // Whoever does the last split of a head puts them together.
    INLINE_MEMBER void run(const Attend& a, int64_t item) const {
        const AttendJob& job = jobs[item];
        if (!job.partial) return Tile<T>(a, job.sequence, job.kv_head, job.begin, job.end - job.begin).run();
        decode_split<T>(a, job.sequence, job.kv_head, job.begin, job.end, job.partial);
        if (__atomic_sub_fetch(&job.first->left, 1, __ATOMIC_ACQ_REL)) return;
        job.first->left = job.first->splits;  // for the next layer
        Context<T> context{a, job.sequence};
        for (int64_t group = a.heads / a.kv_heads, head = 0; head < group; head++)
            join_splits(job.first->partial + head * partial_floats(a.head_dim), job.first->splits, part, a.head_dim,
                        context.result(context.first_row(), job.kv_head * group + head));
    }
};

template <class T> void attend(const Attend& a) {
    struct Shared {
        const Attend& a;
        AttendJobs<T> jobs;
    } shared{a, AttendJobs<T>(a)};
    parallel(shared.jobs.count, [](const void* context, int64_t item) {
        const Shared& s = *(const Shared*)context;
        s.jobs.run(s.a, item);
    }, &shared);
}

}  // namespace
