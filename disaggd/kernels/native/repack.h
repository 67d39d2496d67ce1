// Blocks of the pool gathered into another block size, head range and dtype, or into the fp8 wire format; and from that back into a pool.
// They are gathered on the calling thread alone: it is the one that moves bytes to other nodes, and others compute beside it. They are
// unpacked on all: whoever computes waits for it.
#pragma once

#include "simd.h"

namespace {

// ── float8 e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; 448 is the largest, 0x7f is NaN, and there is no infinity ──

constexpr float E4M3_MAX = 448.0f;
constexpr float LEAST_SCALE = 0x1p-126f;  // the least whose reciprocal is finite and normal
constexpr int64_t HEADER_BYTES = 16;  // of a head's block: K's and V's scale, and as much again, unused: what follows is aligned to 16
typedef uint8_t B8 __attribute__((vector_size(W)));

// Each below 256.
INLINE void store_bytes(uint8_t* to, U v) {
#if WIDTH == 16
    store_bits(to, _mm512_cvtepi32_epi8((__m512i)v));
#elif WIDTH == 8
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(words, words));
#else
    __m128i words = _mm_packs_epi32((__m128i)v, (__m128i)v);
    store_bits(to, _mm_cvtsi128_si32(_mm_packus_epi16(words, words)));
#endif
}

// To the nearest, ties to even; what lies between two that are not normal by the addition, which rounds to 2⁻⁹. |v| is at most 448, or v is
// no finite number, and then NaN: its bits are more than any other's.
INLINE void store_e4m3(uint8_t* to, F v) {
    I bits = (I)v, size = bits & 0x7fffffff;
    I normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3);
    I tiny = (I)((F)size + 16384.0f) - 0x46800000;
    normal = normal < 0x7f ? normal : I{} + 0x7f;
    I code = size < 0x3c800000 ? tiny : normal;  // 2⁻⁶
    store_bytes(to, (U)(code | (bits >> 24 & 0x80)));
}

INLINE F load_e4m3(const uint8_t* from) {
#if WIDTH == 16
    U code = (U)_mm512_cvtepu8_epi32(load_bits<__m128i>(from));
#elif WIDTH == 8
    U code = (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    U code = __builtin_convertvector(load_bits<B8>(from), U);
#endif
    U size = code & 0x7f;
    F normal = (F)((size + (120 << 3)) << 20);
    F tiny = __builtin_convertvector((I)size, F) * 0x1p-9f;
    U value = (I)size < 8 ? (U)tiny : (U)normal;
    value = size == 0x7f ? U{} + 0x7fc00000 : value;
    return (F)(value | (code & 0x80) << 24);
}

template <class T> INLINE void quantize_run(const T* from, uint8_t* to, int64_t count, F inverse) {
    each_vector(count, [&](int64_t i) { store_e4m3(to + i, load(from + i) * inverse); },
                [&](int64_t i, int64_t part) {
                    uint8_t whole[W];
                    store_e4m3(whole, load_part(from + i, part) * inverse);
                    memcpy(to + i, whole, part);
                });
}

template <class T> INLINE void dequantize_run(const uint8_t* from, T* to, int64_t count, F scale) {
    each_vector(count, [&](int64_t i) { store(to + i, load_e4m3(from + i) * scale); },
                [&](int64_t i, int64_t part) {
                    uint8_t whole[W] = {};
                    memcpy(whole, from + i, part);
                    store_part(to + i, load_e4m3(whole) * scale, part);
                });
}

// The larger of `most` and each |x| that is finite: of floats without a sign, the larger one has the larger bits.
template <class T> INLINE I largest(const T* from, int64_t count, I most) {
    auto take = [&](F v) {
        I size = (I)v & 0x7fffffff;
        size = size < 0x7f800000 ? size : I{};
        most = size > most ? size : most;
    };
    each_vector(count, [&](int64_t i) { take(load(from + i)); }, [&](int64_t i, int64_t part) { take(load_part(from + i, part)); });
    return most;
}

// ── gathering ──

INLINE void cast_run(const float* from, float* to, int64_t count) { memcpy(to, from, count * sizeof(float)); }
INLINE void cast_run(const bf16* from, bf16* to, int64_t count) { memcpy(to, from, count * sizeof(bf16)); }
INLINE void cast_run(const f16* from, f16* to, int64_t count) { memcpy(to, from, count * sizeof(f16)); }
template <class S, class T> INLINE void cast_run(const S* from, T* to, int64_t count) {
    each_vector(count, [&](int64_t i) { store(to + i, load(from + i)); },
                [&](int64_t i, int64_t part) { store_part(to + i, load_part(from + i, part), part); });
}

// Calls step(from, first, count) for each run of tokens that lies in one block of the pool and in target block `target`: `from` are the
// keys (values 0) or the values (1) of the run's first token, which is the target block's `first`-th. Returns how many tokens it has in all.
template <class T, class Step>
INLINE int64_t each_run(const Repack& a, int64_t layer, int64_t target, int64_t head, int64_t values, Step step) {
    const T* keys_or_values = (const T*)a.pool + layer * a.layer_stride + (2 * head + values) * a.source_size * a.head_dim;
    const int64_t begin = target * a.target_size, end = begin + a.target_size < a.tokens ? begin + a.target_size : a.tokens;
    for (int64_t token = begin; token < end;) {
        const int64_t in_source = (a.start + token) % a.source_size;
        const int64_t count = a.source_size - in_source < end - token ? a.source_size - in_source : end - token;
        step(keys_or_values + a.blocks[(a.start + token) / a.source_size] * a.block_stride + in_source * a.head_dim, token - begin, count);
        token += count;
    }
    return end - begin;
}

// Calls each(layer, target block, head, values, piece) for the pieces of the target layout, in their order.
template <class Each> INLINE void each_piece(const Repack& a, Each each) {
    const int64_t targets = (a.tokens + a.target_size - 1) / a.target_size;
    int64_t piece = 0;
    for (int64_t layer = 0; layer < a.layers; layer++)
        for (int64_t target = 0; target < targets; target++)
            for (int64_t head = 0; head < a.heads; head++)
                for (int64_t values = 0; values < 2; values++) each(layer, target, head, values, piece++);
}

template <class S, class T> void repack(const Repack& a) {
    const int64_t dim = a.head_dim, length = a.target_size * dim;
    each_piece(a, [&](int64_t layer, int64_t target, int64_t head, int64_t values, int64_t piece) {
        T* to = (T*)a.out + piece * length;
        const int64_t tokens = each_run<S>(a, layer, target, head, values, [&](const S* from, int64_t first, int64_t count) {
            cast_run(from, to + first * dim, count * dim);
        });
        memset(to + tokens * dim, 0, (length - tokens * dim) * sizeof(T));
    });
}

template <class S> void repack_fp8(const Repack& a) {
    const int64_t dim = a.head_dim, length = a.target_size * dim;
    each_piece(a, [&](int64_t layer, int64_t target, int64_t head, int64_t values, int64_t piece) {
        uint8_t* block = (uint8_t*)a.out + piece / 2 * (HEADER_BYTES + 2 * length);
        I most = {};
        each_run<S>(a, layer, target, head, values, [&](const S* from, int64_t, int64_t count) { most = largest(from, count * dim, most); });
        const float exact = max((F)most) / E4M3_MAX, scale = exact > LEAST_SCALE ? exact : LEAST_SCALE;
        if (!values) memset(block, 0, HEADER_BYTES);
        memcpy(block + values * sizeof scale, &scale, sizeof scale);
        uint8_t* to = block + HEADER_BYTES + values * length;
        const F inverse = broadcast(1.0f / scale);
        const int64_t tokens = each_run<S>(a, layer, target, head, values, [&](const S* from, int64_t first, int64_t count) {
            quantize_run(from, to + first * dim, count * dim, inverse);
        });
        memset(to + tokens * dim, 0, length - tokens * dim);
    });
}

// One block of one layer.
template <class T> INLINE void unpack_block(const UnpackFp8& a, int64_t layer, int64_t i) {
    const int64_t length = a.block_size * a.head_dim, head_bytes = HEADER_BYTES + 2 * length;
    const uint8_t* from = (const uint8_t*)a.wire + (layer * a.wire_blocks + a.landed[i]) * a.heads * head_bytes;
    T* to = (T*)a.pool + (layer * a.pool_blocks + a.blocks[i]) * a.heads * 2 * length;
    for (int64_t head = 0; head < a.heads; head++, from += head_bytes, to += 2 * length)
        for (int64_t values = 0; values < 2; values++) {
            float scale;
            memcpy(&scale, from + values * sizeof scale, sizeof scale);
            dequantize_run(from + HEADER_BYTES + values * length, to + values * length, length, broadcast(scale));
        }
}

template <class T> void unpack_fp8(const UnpackFp8& a) {
    parallel(a.layers * a.count, [](const void* context, int64_t item) {
        const UnpackFp8& a = *(const UnpackFp8*)context;
        unpack_block<T>(a, item / a.count, item % a.count);
    }, &a);
}

}  // namespace
