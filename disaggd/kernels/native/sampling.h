// Logits → tokens; formulas and names as in reference_sampling.py.
//
// A row's token is the same whoever shares its batch and however many threads there are: one thread draws it, from its own logits.
//
// Against the torch sampler: scores are the same bits, and so are those that top-k keeps. Noise is worked out in float64 and rounded
// to float32 as there; a last-bit difference of the two `log` changes one noise in some 2²⁸. Masses are float64 as there, but summed
// in another order: the nucleus may differ by its last token where the mass up to it is within 10⁻¹² of p.
#pragma once

#include "rows.h"

namespace {

typedef uint64_t L __attribute__((vector_size(4 * W)));
typedef double D __attribute__((vector_size(4 * W)));

// ── lanes as bits ──

#if WIDTH == 16
#define COMPARED(f, a, op, b) _mm512_cmp_ps_mask((__m512)(a), (__m512)(b), _CMP_##op##_OQ)
#elif WIDTH == 8
#define COMPARED(f, a, op, b) (unsigned)_mm256_movemask_ps(_mm256_cmp_ps((__m256)(a), (__m256)(b), _CMP_##op##_OQ))
#else
#define COMPARED(f, a, op, b) (unsigned)_mm_movemask_ps(_mm_cmp##f##_ps((__m128)(a), (__m128)(b)))
#endif
// A bit for each lane; none for a NaN.
INLINE unsigned at_least(F a, F b) { return COMPARED(ge, a, GE, b); }
INLINE unsigned above(F a, F b) { return COMPARED(gt, a, GT, b); }
INLINE unsigned equal(F a, F b) { return COMPARED(eq, a, EQ, b); }
#undef COMPARED

// Writes the chosen lanes of v side by side, and what comes to lie behind them, W floats in all; returns how many were chosen.
INLINE int64_t compress(float* to, F v, unsigned chosen) {
#if WIDTH == 16
    store(to, (F)_mm512_maskz_compress_ps(chosen, (__m512)v));  // into a register: to memory it is microcode on AMD
    return __builtin_popcount(chosen);
#else
    float all[W];
    store(all, v);
    int64_t count = 0;
    UNROLL for (int j = 0; j < W; j++) {
        to[count] = all[j];
        count += chosen >> j & 1;
    }
    return count;
#endif
}

// ── one row ──

struct Row {
    const float* logits;
    int64_t count;
    float best, temperature;

    INLINE_MEMBER F scores(F x) const { return (x - best) / temperature; }
    INLINE_MEMBER float score(float x) const { return (x - best) / temperature; }

    // What x − best must at least reach for a score of `floor`: to skip most of a row without dividing. The second term is more than
    // the quotient's and the product's rounding, 2⁻²³ together, the third more than what is lost where they are subnormal.
    INLINE_MEMBER float reach(float floor) const { return floor * temperature * (1 + 0x1p-20f) - 1e-37f; }
};

// The logits of a row from i on, −∞ beyond its end.
INLINE F logits_at(const float* logits, int64_t count, int64_t i) {
    if (i + W <= count) return load(logits + i);
    if (i >= count) return broadcast(-INFINITY);
    return lanes() < I{} + (int32_t)(count - i) ? load_part(logits + i, count - i) : broadcast(-INFINITY);
}

INLINE float best_of(const float* logits, int64_t count) {
    F best[4];
    UNROLL for (int v = 0; v < 4; v++) best[v] = broadcast(-INFINITY);
    int64_t i = 0;
    // The new one first: of a NaN the instruction returns the second.
    for (; i + 4 * W <= count; i += 4 * W)
        UNROLL for (int v = 0; v < 4; v++) best[v] = maximum(load(logits + i + v * W), best[v]);
    for (; i < count; i += W) best[0] = maximum(logits_at(logits, count, i), best[0]);
    return max(maximum(maximum(best[0], best[1]), maximum(best[2], best[3])));
}

// The lowest entry that has the value; 0 in a row of NaNs, where none has.
INLINE int64_t first_of(const float* logits, int64_t count, float value) {
    for (int64_t i = 0; i < count; i += W)
        if (const unsigned found = equal(logits_at(logits, count, i), broadcast(value))) {
            const int64_t entry = i + __builtin_ctz(found);
            return entry < count ? entry : 0;  // −∞ is also what lies beyond the row's end
        }
    return 0;
}

// ── filters: a threshold is found by selection, for what it weighs ──

// e^x to 2 units in the last place for x ≤ 0, 0 below −700; exactly 1 for 0. 2^n · p(r), x = n · ln 2 + r, |r| ≤ ½ ln 2, p Taylor's: its
// first missing term is r¹⁴ / 14! < 2⁻⁵⁷.
INLINE D exp(D x) {
    constexpr double SHIFT = 0x1.8p52;  // leaves the nearest integer in the lowest bits
    const D shifted = (x < -700.0 ? D{} - 700.0 : x) * 1.4426950408889634 + SHIFT, n = shifted - SHIFT;
    const D r = ((x < -700.0 ? D{} - 700.0 : x) - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    D p = D{} + 1.0 / 6227020800;
    constexpr double FACTORIALS[] = {479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1};
    UNROLL for (double factorial : FACTORIALS) p = p * r + 1.0 / factorial;
    return x < -700.0 ? D{} : (D)((L)p + ((L)shifted << 52));
}

typedef UpTo<W / 2>::type HalfLanes;
template <int first, int... J> INLINE D wide(F v, Lanes<J...>) {
    return __builtin_convertvector(__builtin_shufflevector(v, v, (first + J)...), D);
}

// Σ e^score of some logits.
INLINE double mass_of(const Row& row, const float* values, int64_t count) {
    D sums[2] = {};
    for (int64_t i = 0; i < count; i += W) {
        const F scores = row.scores(logits_at(values, count, i));
        sums[0] += exp(wide<0>(scores, HalfLanes()));
        sums[1] += exp(wide<W / 2>(scores, HalfLanes()));
    }
    const D sum = sums[0] + sums[1];
    double total = 0;
    UNROLL for (int j = 0; j < W / 2; j++) total += sum[j];
    return total;
}

// The third best of 16 taken from all over: filters keep few of many, so it is near what they look for, and most fall away at once.
INLINE float pivot_of(const float* values, int64_t count) {
    float first = -INFINITY, second = first, third = first;
    for (int64_t sample = 0; sample < 16; sample++) {
        const float v = values[(2 * sample + 1) * count / 32];
        const float lesser = v < first ? v : first, least = lesser < second ? lesser : second;
        first = v > first ? v : first;
        second = lesser > second ? lesser : second;
        third = least > third ? least : third;
    }
    return third;
}

// The greatest of `values` such that those that are at least as great weigh `goal` together, each 1 or its mass. Spoils `values` and
// `spare`, which have room for W floats more than they hold.
template <bool by_mass> INLINE float select(const Row& row, float* values, float* spare, int64_t count, double goal) {
    while (count > 0) {
        const float pivot = pivot_of(values, count);
        int64_t greater = 0, less = 0;
        for (int64_t i = 0; i < count; i += W) {
            const F v = logits_at(values, count, i);
            const unsigned up = above(v, broadcast(pivot)), down = above(broadcast(pivot), v);
            greater += compress(spare + greater, v, up);
            less += compress(values + less, v, i + W <= count ? down : down & ((1u << (count - i)) - 1));  // behind i at most
        }
        const double weight = by_mass ? mass_of(row, spare, greater) : greater;
        if (greater > 0 && weight >= goal) {
            float* found = spare;
            spare = values;
            values = found;
            count = greater;
            continue;
        }
        goal -= weight + (count - greater - less) * (by_mass ? mass_of(row, &pivot, 1) : 1);
        if (goal <= 0) return pivot;
        count = less;
    }
    return -INFINITY;
}

// Copies the logits whose scores are at least `floor`; returns how many there are. A floor of −∞ also copies the −∞ that fill up the
// last vector: they come after all others, and weigh nothing.
INLINE int64_t gather(const Row& row, float floor, float* to) {
    int64_t count = 0;
    for (int64_t i = 0; i < row.count; i += W) {
        const F x = logits_at(row.logits, row.count, i);
        if (!at_least(x - row.best, broadcast(row.reach(floor)))) continue;
        count += compress(to + count, x, at_least(row.scores(x), broadcast(floor)));
    }
    return count;
}

// The least score that the filters keep.
INLINE float threshold_of(const Row& row, int64_t top_k, float top_p, float floor) {
    const int64_t room = (row.count + 2 * W) / W * W;
    float *values = (float*)scratch(CANDIDATES, 2 * room * sizeof(float)), *spare = values + room;
    float kept = -INFINITY;
    if (top_k > 0 && top_k < row.count) {
        const int64_t count = gather(row, top_p < 1 ? -INFINITY : floor, values);  // top-p is of what top-k keeps, whatever the floor
        if (count > top_k) kept = row.score(select<false>(row, values, spare, count, top_k));
    }
    if (top_p < 1) {
        const int64_t count = gather(row, kept, values);
        const float crossing = select<true>(row, values, spare, count, top_p * mass_of(row, values, count));
        kept = fmaxf(kept, row.score(crossing));
    }
    return fmaxf(kept, floor);
}

// ── noise ──

INLINE L multiply_words(L a, uint32_t b) {
#if WIDTH == 16
    return (L)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif WIDTH == 8
    return (L)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
    return (L)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#endif
}

template <int... J> INLINE void interleave(L a, L b, U (&to)[2], Lanes<J...>) {
    to[0] = (U)__builtin_shufflevector(a, b, (J % 2 * (W / 2) + J / 2)...);
    to[1] = (U)__builtin_shufflevector(a, b, (J % 2 * (W / 2) + J / 2 + W / 4)...);
}

// Philox4x32-10 (Salmon et al. 2011): the words of 2 · W entries from the multiple of 4 `entry` on. Counters and keys are 32 bits; they
// lie in lanes of 64, whose upper halves hold what the multiplications left.
INLINE void philox(int64_t entry, uint64_t seed, uint32_t position, U (&words)[2]) {
    L c0 = L{} + (uint64_t)(entry / 4), c1 = L{} + position, c2 = {}, c3 = {};
    UNROLL for (int j = 0; j < W / 2; j++) c0[j] += j;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    UNROLL for (int round = 0; round < 10; round++) {
        const L first = multiply_words(c0, 0xD2511F53), second = multiply_words(c2, 0xCD9E8D57);
        c0 = (second >> 32) ^ c1 ^ (uint64_t)k0;
        c1 = second;
        c2 = (first >> 32) ^ c3 ^ (uint64_t)k1;
        c3 = first;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    interleave((c0 & 0xFFFFFFFF) | c1 << 32, (c2 & 0xFFFFFFFF) | c3 << 32, words, HalfLanes());
}

INLINE float gumbel(uint32_t word) { return (float)-log(-log((word + 0.5) * 0x1p-32)); }

// No less than `gumbel` of the words, by no logarithm. With u = (word + ½) / 2³² and z = 2³² − 1 − word, 1 − u = (z + ½) / 2³², and
//     −log u ≥ 1 − u,   so   gumbel ≤ −log(1 − u) = ln 2 · (32 − log₂(z + ½)).
// f = ⌊z / 2⌋ + ¼ is at most (z + ½) / 2. The bits of a float f, as an integer over 2²³, are 127 + e + m for f = 2^e · (1 + m), and
// m ≤ log₂(1 + m): so bits / 2²³ − 127 ≤ log₂ f ≤ log₂(z + ½) − 1, and
//     gumbel ≤ ln 2 · (31 + 127 − bits / 2²³).
// Float32 rounds f by 2⁻²⁴ of it, the product by 2⁻²³ of at most 110 and the difference by less: 2 · 10⁻⁵ in all, for which 10⁻⁴ is added;
// that covers the rounding of `gumbel` itself. Of u from 0.9 on, where most entries win, the bound is at most 0.11 too high, but for the
// uppermost words; at u = ½ it is 0.33.
INLINE F noise_bound(U words) {
    const F f = __builtin_convertvector((I)(0x7FFFFFFF - (words >> 1)), F) + 0.25f;
    return 109.51736f - __builtin_convertvector((I)f, F) * 8.262958e-8f;
}

void noise(const Noise& a) {
    for (int64_t i = 0; i < a.count; i += W) {
        store(a.bounds + i, noise_bound(load_bits<U>(a.words + i)));
        UNROLL for (int j = 0; j < W; j++) a.noise[i + j] = gumbel(a.words[i + j]);
    }
}

// ── the draw ──

// The entry of the greatest score + noise of those whose scores are at least `floor`, the lowest of equals; −1 if there is none. Noise
// is made only for entries that its bound lets win: for about a dozen of 16k, whether their
// scores are equal or far apart.
INLINE int64_t draw(const Row& row, float floor, uint64_t seed, uint32_t position) {
    float most = -INFINITY;
    int64_t drawn = -1;
    const F lowest = broadcast(floor), reach = broadcast(row.reach(floor));
    for (int64_t i = 0; i < row.count; i += 2 * W) {
        const F x[2] = {logits_at(row.logits, row.count, i), logits_at(row.logits, row.count, i + W)};
        if (!(at_least(x[0] - row.best, reach) | at_least(x[1] - row.best, reach))) continue;
        U words[2];
        philox(i, seed, position, words);
        UNROLL for (int v = 0; v < 2; v++) {
            const F scores = row.scores(x[v]), bounds = scores + noise_bound(words[v]);
            unsigned able = at_least(scores, lowest) & above(bounds, broadcast(most));
            if (!able) continue;
            for (; able; able &= able - 1) {
                const int j = __builtin_ctz(able);
                if (!(bounds[j] > most)) continue;
                const float sum = scores[j] + gumbel(words[v][j]);
                if (!(sum > most)) continue;
                most = sum;
                drawn = i + v * W + j;
            }
        }
    }
    return drawn;
}

void sample_rows(const Sample& a, int64_t first, int64_t end) {
    for (int64_t r = first; r < end; r++) {
        const float* logits = a.logits + r * a.stride;
        const float best = best_of(logits, a.vocab_size);
        int64_t drawn = -1;
        if (a.temperatures && a.temperatures[r] != 0) {
            const Row row{logits, a.vocab_size, best, a.temperatures[r]};
            drawn = draw(row, threshold_of(row, a.top_k[r], a.top_p[r], a.floors[r]), a.seeds[r], (uint32_t)a.positions[r]);
        }
        a.tokens[r] = drawn < 0 ? first_of(logits, a.vocab_size, best) : drawn;  // of nothing but NaN and infinities nothing is kept
    }
}

// The best of a row takes a quarter of the time that a norm takes; a draw takes three times as long.
void sample(const Sample& a) { parallel_rows<Sample, sample_rows>(a, a.rows, a.temperatures ? a.vocab_size : a.vocab_size / 4 + 1); }

}  // namespace
