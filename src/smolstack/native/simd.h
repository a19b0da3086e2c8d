// Vectors of eight floats and of 32 bytes: AVX2, with VNNI where the processor has it. Without
// AVX2 the same names are plain C, which compilers turn into NEON and the like themselves.
#ifndef SMOLSTACK_SIMD_H
#define SMOLSTACK_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define SIMD_AVX2 1
#include <immintrin.h>
#endif
#if defined(SIMD_AVX2) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define SIMD_VNNI 1
#define DPBUSD _mm256_dpbusd_epi32
#elif defined(SIMD_AVX2) && defined(__AVXVNNI__)
#define SIMD_VNNI 1
#define DPBUSD _mm256_dpbusd_avx_epi32
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

#if defined(SIMD_AVX2)
typedef __m256 Float8;
INLINE Float8 zero8(void) { return _mm256_setzero_ps(); }
INLINE Float8 splat8(float x) { return _mm256_set1_ps(x); }
INLINE Float8 load8(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store8(float *p, Float8 x) { _mm256_storeu_ps(p, x); }
INLINE Float8 add8(Float8 a, Float8 b) { return _mm256_add_ps(a, b); }
INLINE Float8 fma8(Float8 a, Float8 b, Float8 c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Float8 load8_half(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
INLINE void store8_half(uint16_t *p, Float8 x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE Float8 load8_bfloat(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE void store8_bfloat(uint16_t *p, Float8 x) {  // rounded to nearest even
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    bits = _mm256_srli_epi32(bits, 16);
    bits = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(bits));
}
INLINE float sum8(Float8 x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
INLINE void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
#else
typedef struct { float at[8]; } Float8;
INLINE Float8 splat8(float x) {
    Float8 out;
    for (int i = 0; i < 8; i++) out.at[i] = x;
    return out;
}
INLINE Float8 zero8(void) { return splat8(0); }
INLINE Float8 load8(const float *p) {
    Float8 out;
    memcpy(out.at, p, sizeof out.at);
    return out;
}
INLINE void store8(float *p, Float8 x) { memcpy(p, x.at, sizeof x.at); }
INLINE Float8 add8(Float8 a, Float8 b) {
    for (int i = 0; i < 8; i++) a.at[i] += b.at[i];
    return a;
}
INLINE Float8 fma8(Float8 a, Float8 b, Float8 c) {
    for (int i = 0; i < 8; i++) c.at[i] += a.at[i] * b.at[i];
    return c;
}
INLINE float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31;
    uint32_t mantissa = half & 0x3ff, bits;
    float out;
    if (exponent == 0) {
        out = (float)mantissa * 0x1p-24f;
        return sign ? -out : out;
    }
    bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
    memcpy(&out, &bits, 4);
    return out;
}
INLINE uint16_t float_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    float magnitude = fabsf(x);
    if (magnitude != magnitude) return sign | 0x7e00;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    if (magnitude < 0x1p-14f) return sign | (uint16_t)rintf(magnitude * 0x1p24f);
    bits = (bits & 0x7fffffff) - (112u << 23);
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t)(bits >> 13);
}
INLINE Float8 load8_half(const uint16_t *p) {
    Float8 out;
    for (int i = 0; i < 8; i++) out.at[i] = half_to_float(p[i]);
    return out;
}
INLINE void store8_half(uint16_t *p, Float8 x) {
    for (int i = 0; i < 8; i++) p[i] = float_to_half(x.at[i]);
}
INLINE Float8 load8_bfloat(const uint16_t *p) {
    Float8 out;
    for (int i = 0; i < 8; i++) {
        uint32_t bits = (uint32_t)p[i] << 16;
        memcpy(&out.at[i], &bits, 4);
    }
    return out;
}
INLINE void store8_bfloat(uint16_t *p, Float8 x) {  // rounded to nearest even
    for (int i = 0; i < 8; i++) {
        uint32_t bits;
        memcpy(&bits, &x.at[i], 4);
        p[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}
INLINE float sum8(Float8 x) {
    float a = (x.at[0] + x.at[4]) + (x.at[2] + x.at[6]);
    return a + ((x.at[1] + x.at[5]) + (x.at[3] + x.at[7]));
}
INLINE void prefetch(const void *p) { __builtin_prefetch(p); }
#endif

INLINE float load_bfloat(const uint16_t *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

// e^x to about one part in 10⁷, in a form that compilers vectorize (Cephes' polynomial).
INLINE float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t bits; float number; } power = {((int32_t)n + 127) << 23};
    return p * power.number;
}

#endif
