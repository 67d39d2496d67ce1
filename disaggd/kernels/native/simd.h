// One vector of WIDTH floats, in the compiler's vector extension, and what the formulas need of it. Results are float32 throughout;
// memory may hold float32, bfloat16 or float16.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int W = WIDTH;
typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef int8_t B __attribute__((vector_size(W)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class V> INLINE V load_bits(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}
template <class V> INLINE void store_bits(void* to, V v) { memcpy(to, &v, sizeof v); }

INLINE F broadcast(float x) { return F{} + x; }
// As instructions: of `a > b ? a : b` GCC makes a comparison and a blend.
INLINE F maximum(F a, F b) {
#if WIDTH == 16
    return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif WIDTH == 8
    return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return (F)_mm_max_ps((__m128)a, (__m128)b);
#endif
}
INLINE I lanes() {
    I v;
    UNROLL for (int j = 0; j < W; j++) v[j] = j;
    return v;
}

// ── conversions ──

INLINE F load(const float* from) { return load_bits<F>(from); }
INLINE void store(float* to, F v) { store_bits(to, v); }

INLINE U widen(const uint16_t* from) {
#if WIDTH == 16
    return (U)_mm512_cvtepu16_epi32(load_bits<__m256i>(from));
#elif WIDTH == 8
    return (U)_mm256_cvtepu16_epi32(load_bits<__m128i>(from));
#else
    return __builtin_convertvector(load_bits<H>(from), U);
#endif
}
INLINE F load(const bf16* from) { return (F)(widen(&from->bits) << 16); }
INLINE void store(bf16* to, F v) {
#if BF16_PAIRS
    store_bits(to, _mm512_cvtneps_pbh((__m512)v));
#else
    U bits = (U)v;
    U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    store_bits(to, __builtin_convertvector(v == v ? rounded : (bits >> 16) | 64, H));
#endif
}

#if WIDTH == 16
INLINE F load(const f16* from) { return (F)_mm512_cvtph_ps(load_bits<__m256i>(from)); }
INLINE void store(f16* to, F v) { store_bits(to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
#elif WIDTH == 8
INLINE F load(const f16* from) { return (F)_mm256_cvtph_ps(load_bits<__m128i>(from)); }
INLINE void store(f16* to, F v) { store_bits(to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#else
INLINE F load(const f16* from) {
    U half = widen(&from->bits);
    F finite = (F)((half & 0x7fff) << 13) * 0x1p112f;
    U special = (half & 0x7c00) == 0x7c00 ? U{} + 0x7f800000 : U{};
    return (F)((U)finite | special | (half & 0x8000) << 16);
}
INLINE void store(f16* to, F v) {
    U sign = (U)v >> 16 & 0x8000;
    F size = (F)((U)v & 0x7fffffff);
    U bits = (U)(size * 0x1p-112f);
    U rounded = (bits + 0xfff + ((bits >> 13) & 1)) >> 13;
    U half = size >= broadcast(65520.0f) ? U{} + 0x7c00 : rounded;
    store_bits(to, __builtin_convertvector((v == v ? half : U{} + 0x7e00) | sign, H));
}
#endif

INLINE F load(const int8_t* from) {
#if WIDTH == 16
    return (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bits<__m128i>(from)));
#elif WIDTH == 8
    return (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    return __builtin_convertvector(__builtin_convertvector(load_bits<B>(from), I), F);
#endif
}

// The first `count` < W elements; the rest is 0, or left alone.
template <class T> INLINE F load_part(const T* from, int64_t count) {
    T whole[W] = {};
    memcpy(whole, from, count * sizeof(T));
    return load(whole);
}
template <class T> INLINE void store_part(T* to, F v, int64_t count) {
    T whole[W];
    store(whole, v);
    memcpy(to, whole, count * sizeof(T));
}

// Calls step(first element, load, store) for each vector of [0, count), the last of them maybe in part.
template <class Whole, class Part> INLINE void each_vector(int64_t count, Whole whole, Part part) {
    int64_t i = 0;
    for (; i + W <= count; i += W) whole(i);
    if (i < count) part(i, count - i);
}

// ── over the lanes ──

template <int... J> struct Lanes {};
template <int N, int... J> struct UpTo : UpTo<N - 1, N - 1, J...> {};
template <int... J> struct UpTo<0, J...> { typedef Lanes<J...> type; };
typedef UpTo<W>::type AllLanes;

// In groups of 2·h lanes: the first halves of a's and b's groups side by side, and the second halves.
template <int h, class V, int... J> INLINE V firsts(V a, V b, Lanes<J...>) {
    return __builtin_shufflevector(a, b, ((J & h) == 0 ? J : W + J - h)...);
}
template <int h, class V, int... J> INLINE V seconds(V a, V b, Lanes<J...>) {
    return __builtin_shufflevector(a, b, ((J & h) == 0 ? J + h : W + J)...);
}

template <int h> INLINE void sum_each_level(F* v) {
    UNROLL for (int i = 0; i < h; i++) v[i] = firsts<h>(v[i], v[i + h], AllLanes()) + seconds<h>(v[i], v[i + h], AllLanes());
    if constexpr (h > 1) sum_each_level<h / 2>(v);
}
// The sums of W vectors, in order, in one.
INLINE F sum_each(F (&v)[W]) {
    sum_each_level<W / 2>(v);
    return v[0];
}

template <int h> INLINE void transpose_level(F* v) {
    UNROLL for (int i = 0; i < W; i++) {
        if (i & h) continue;
        F a = v[i], b = v[i + h];
        v[i] = firsts<h>(a, b, AllLanes());
        v[i + h] = seconds<h>(a, b, AllLanes());
    }
    if constexpr (h > 1) transpose_level<h / 2>(v);
}
INLINE void transpose(F (&v)[W]) { transpose_level<W / 2>(v); }

template <int h> INLINE float sum_level(F v) {
    v += seconds<h>(v, v, AllLanes());
    if constexpr (h > 1) return sum_level<h / 2>(v);
    return v[0];
}
INLINE float sum(F v) { return sum_level<W / 2>(v); }

template <int h> INLINE float max_level(F v) {
    v = maximum(v, seconds<h>(v, v, AllLanes()));
    if constexpr (h > 1) return max_level<h / 2>(v);
    return v[0];
}
INLINE float max(F v) { return max_level<W / 2>(v); }

// ── powers ──

constexpr float LOG2_E = 1.44269504f;

// 2^x to 2 units in the last place for −126 ≤ x ≤ 127, about 0 below (0 for −∞): 2^n · p(x − n), Cephes' polynomial.
INLINE F exp2(F x) {
#if WIDTH == 16
    x = maximum(x, broadcast(-200.0f));
    F n = (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = maximum(x, broadcast(-127.0f));
    F shifted = x + 12582912.0f;  // 1.5 · 2²³: leaves the nearest integer in the lowest bits
    F n = shifted - 12582912.0f;
#endif
    F r = x - n;
    F p = broadcast(1.535336188e-4f);
    p = p * r + 1.339887440e-3f;
    p = p * r + 9.618437358e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472029e-1f;
    p = p * r + 1.0f;
#if WIDTH == 16
    return (F)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return x > broadcast(-127.0f) ? (F)((I)p + ((I)shifted << 23)) : F{};
#endif
}

}  // namespace
