// Sixteen lanes at a time: the one layer between the algorithms and the processor.
//
// `Floats` and `Ints` are 16 lanes of 32 bits, held in as many native vectors as that takes: one
// with AVX-512, two with AVX2, four with SSE2 or NEON. Plain arithmetic is that of GCC's vector
// types; what they cannot say (fused multiply-add, products of bytes, bfloat16 pairs) stands once
// for every instruction set: here, in vector_formats.h (numbers of 16, 8 and 4 bits),
// vector_products.h (products of them) and vector_functions.h (exponential and activations).
// Nothing outside these files names an instruction.
#ifndef SMOLSTACK_VECTOR_H
#define SMOLSTACK_VECTOR_H

#include "smolstack.h"

#include <math.h>
#include <string.h>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define VECTOR_512 1
#define NATIVE 64
#else
#define VECTOR_256 1
#define NATIVE 32
#endif
#else
#define NATIVE 16
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define LANES 16
#define PARTS (64 / NATIVE)
#define EACH UNROLL for (int k = 0; k < PARTS; k++)

typedef float vf __attribute__((vector_size(NATIVE)));
typedef int32_t vi __attribute__((vector_size(NATIVE)));
typedef int16_t vs __attribute__((vector_size(NATIVE)));
typedef float Four __attribute__((vector_size(16)));
typedef struct { vf part[PARTS]; } Floats;
typedef struct { vi part[PARTS]; } Ints;

INLINE void prefetch(const void *p) { __builtin_prefetch(p); }

INLINE Floats splat(float x) {
    Floats out;
    EACH out.part[k] = x - (vf){0};
    return out;
}
INLINE Ints splat_int(int32_t x) {
    Ints out;
    EACH out.part[k] = x - (vi){0};
    return out;
}
INLINE Floats load(const float *p) {
    Floats out;
    EACH memcpy(&out.part[k], (const char *)p + k * NATIVE, NATIVE);
    return out;
}
INLINE void store(float *p, Floats x) { EACH memcpy((char *)p + k * NATIVE, &x.part[k], NATIVE); }
INLINE Ints load_bytes(const void *p) {  // 64 bytes: four to a lane
    Ints out;
    EACH memcpy(&out.part[k], (const char *)p + k * NATIVE, NATIVE);
    return out;
}
INLINE void store_bytes(void *p, Ints x) { EACH memcpy((char *)p + k * NATIVE, &x.part[k], NATIVE); }

// The first `count` lanes from memory, the others 0; nothing behind them is touched.
INLINE Floats load_some(const float *p, int64_t count) {
    if (count >= LANES) return load(p);
#if defined(VECTOR_512)
    Floats out = {{(vf)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p)}};
    return out;
#else
    float some[LANES] = {0};
    memcpy(some, p, (size_t)count * 4);
    return load(some);
#endif
}
INLINE void store_some(float *p, Floats x, int64_t count) {
    if (count >= LANES) {
        store(p, x);
        return;
    }
#if defined(VECTOR_512)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)x.part[0]);
#else
    float some[LANES];
    store(some, x);
    memcpy(p, some, (size_t)count * 4);
#endif
}

INLINE Floats add(Floats a, Floats b) { EACH a.part[k] += b.part[k]; return a; }
INLINE Floats sub(Floats a, Floats b) { EACH a.part[k] -= b.part[k]; return a; }
INLINE Floats mul(Floats a, Floats b) { EACH a.part[k] *= b.part[k]; return a; }
INLINE Floats divide(Floats a, Floats b) { EACH a.part[k] /= b.part[k]; return a; }
INLINE Ints add_int(Ints a, Ints b) { EACH a.part[k] += b.part[k]; return a; }
INLINE Ints bits_of(Floats x) { Ints out; EACH out.part[k] = (vi)x.part[k]; return out; }
INLINE Floats from_bits(Ints x) { Floats out; EACH out.part[k] = (vf)x.part[k]; return out; }
INLINE Ints and_int(Ints a, int32_t b) { EACH a.part[k] &= b; return a; }
INLINE Ints left(Ints a, int by) { EACH a.part[k] <<= by; return a; }
INLINE Ints right(Ints a, int by) { EACH a.part[k] >>= by; return a; }

INLINE vf fma_part(vf a, vf b, vf c) {
#if defined(VECTOR_512)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(VECTOR_256)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
INLINE Floats fma_lanes(Floats a, Floats b, Floats c) {
    EACH c.part[k] = fma_part(a.part[k], b.part[k], c.part[k]);
    return c;
}

INLINE vf max_part(vf a, vf b) {
#if defined(VECTOR_512)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(VECTOR_256)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__aarch64__)
    return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#else
    vi larger = a > b;
    return (vf)(((vi)a & larger) | ((vi)b & ~larger));
#endif
}
INLINE Floats max_lanes(Floats a, Floats b) {
    EACH a.part[k] = max_part(a.part[k], b.part[k]);
    return a;
}
INLINE vf min_part(vf a, vf b) {
#if defined(VECTOR_512)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(VECTOR_256)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__aarch64__)
    return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b);
#else
    vi smaller = a < b;
    return (vf)(((vi)a & smaller) | ((vi)b & ~smaller));
#endif
}
INLINE Floats min_lanes(Floats a, Floats b) {
    EACH a.part[k] = min_part(a.part[k], b.part[k]);
    return a;
}
// Lanes of a where x < y, else those of b.
INLINE Floats where_less(Floats x, Floats y, Floats a, Floats b) {
#if defined(VECTOR_512)
    __mmask16 less = _mm512_cmp_ps_mask((__m512)x.part[0], (__m512)y.part[0], _CMP_LT_OQ);
    Floats out = {{(vf)_mm512_mask_blend_ps(less, (__m512)b.part[0], (__m512)a.part[0])}};
    return out;
#else
    EACH {
        vi less = x.part[k] < y.part[k];
        a.part[k] = (vf)(((vi)a.part[k] & less) | ((vi)b.part[k] & ~less));
    }
    return a;
#endif
}
INLINE Floats abs_lanes(Floats x) { return from_bits(and_int(bits_of(x), 0x7fffffff)); }

INLINE float first_lane(Floats x) { return x.part[0][0]; }

// The sum of the lanes by halves, lane i + 8 to lane i first: the same bits everywhere.
INLINE float sum_lanes(Floats x) {
#if defined(VECTOR_512)
    return _mm512_reduce_add_ps((__m512)x.part[0]);
#else
#if defined(VECTOR_256)
    __m256 eight = (__m256)(x.part[0] + x.part[1]);
    Four four = (Four)_mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
    Four four = (Four)((x.part[0] + x.part[2]) + (x.part[1] + x.part[3]));
#endif
    return (four[0] + four[2]) + (four[1] + four[3]);
#endif
}
INLINE float largest_lane(Floats x) {
#if defined(VECTOR_512)
    return _mm512_reduce_max_ps((__m512)x.part[0]);
#else
    float some[LANES];
    store(some, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) some[i] = some[i] > some[i + half] ? some[i] : some[i + half];
    return some[0];
#endif
}
INLINE int32_t sum_ints(Ints x) {
#if defined(VECTOR_512)
    return _mm512_reduce_add_epi32((__m512i)x.part[0]);
#else
    int32_t some[LANES], total = 0;
    store_bytes(some, x);
    for (int i = 0; i < LANES; i++) total += some[i];
    return total;
#endif
}

INLINE Floats to_floats(Ints x) {
    Floats out;
    EACH out.part[k] = __builtin_convertvector(x.part[k], vf);
    return out;
}
// To the nearest integer, ties to even, for numbers below 2²²: adding 1.5 · 2²³ leaves it in the
// lowest bits.
INLINE Ints to_nearest(Floats x) {
    Ints out;
    EACH out.part[k] = (vi)(x.part[k] + 12582912.0f) - 0x4b400000;
    return out;
}
INLINE Floats rounded(Floats x) {
    EACH x.part[k] = (x.part[k] + 12582912.0f) - 12582912.0f;
    return x;
}

#endif
