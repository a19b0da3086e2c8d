// Numbers of 16, 8 and 4 bits to vectors and back.
#ifndef SMOLSTACK_VECTOR_FORMATS_H
#define SMOLSTACK_VECTOR_FORMATS_H

#include "vector.h"

INLINE float load_bfloat(const uint16_t *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

// Whether bfloat16 numbers are multiplied in pairs, by an instruction of their own; and whether the
// processor multiplies two rows of four of them by two channels of four (ARM's bf16).
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define BFLOAT_MATRICES 1
#else
#define BFLOAT_MATRICES 0
#endif
#if BFLOAT_MATRICES || (defined(VECTOR_512) && defined(__AVX512BF16__))
#define PAIR_PRODUCTS 1
#else
#define PAIR_PRODUCTS 0
#endif

// 16 bfloat16 numbers as float32, and back, rounded to nearest even.
INLINE Floats load_bfloats(const uint16_t *p) {
#if defined(VECTOR_512)
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    Floats out = {{(vf)_mm512_slli_epi32(wide, 16)}};
    return out;
#elif defined(VECTOR_256)
    Floats out;
    EACH {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + k * 8)));
        out.part[k] = (vf)_mm256_slli_epi32(wide, 16);
    }
    return out;
#elif defined(__aarch64__)
    Floats out;
    EACH out.part[k] = (vf)vshll_n_u16(vld1_u16(p + k * 4), 16);
    return out;
#else
    uint32_t some[LANES];
    Ints out;
    for (int i = 0; i < LANES; i++) some[i] = (uint32_t)p[i] << 16;
    out = load_bytes(some);
    return from_bits(out);
#endif
}
INLINE void store_bfloats(uint16_t *p, Floats x) {
#if defined(VECTOR_512) && defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)x.part[0]));
#elif BFLOAT_MATRICES
    EACH {
        bfloat16x8_t four = vcvtq_low_bf16_f32((float32x4_t)x.part[k]);
        vst1_u16(p + k * 4, vget_low_u16(vreinterpretq_u16_bf16(four)));
    }
#else
    Ints bits = bits_of(x);
    EACH bits.part[k] += ((bits.part[k] >> 16) & 1) + 0x7fff;
#if defined(VECTOR_512)
    _mm256_storeu_si256((__m256i *)p,
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)bits.part[0], 16)));
#elif defined(VECTOR_256)
    __m256i low = _mm256_srli_epi32((__m256i)bits.part[0], 16);
    __m256i both = _mm256_packus_epi32(low, _mm256_srli_epi32((__m256i)bits.part[1], 16));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(both, 0xd8));
#elif defined(__aarch64__)
    EACH vst1_u16(p + k * 4, vshrn_n_u32((uint32x4_t)bits.part[k], 16));
#else
    uint32_t some[LANES];
    store_bytes(some, bits);
    for (int i = 0; i < LANES; i++) p[i] = (uint16_t)(some[i] >> 16);
#endif
#endif
}

// Lanes of a where `which` is -1, of b where it is 0.
INLINE vi choose(vi which, vi a, vi b) { return (a & which) | (b & ~which); }

// 16 float16 numbers as float32, and back, rounded to nearest even.
INLINE Floats load_halfs(const uint16_t *p) {
    Floats out;
#if defined(VECTOR_512)
    out.part[0] = (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(VECTOR_256)
    EACH out.part[k] = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + k * 8)));
#elif defined(__aarch64__)
    EACH out.part[k] = (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + k * 4)));
#else
    int32_t some[LANES];
    for (int i = 0; i < LANES; i++) some[i] = p[i];
    Ints bits = load_bytes(some);
    EACH {
        vi sign = (bits.part[k] & 0x8000) << 16, size = bits.part[k] & 0x7fff;
        vi normal = (size << 13) + (112 << 23);
        vi small = (vi)(__builtin_convertvector(size, vf) * 0x1p-24f);
        normal = choose(size > 0x7bff, (size << 13) | 0x7f800000, normal);
        out.part[k] = (vf)(sign | choose(size < 0x400, small, normal));
    }
#endif
    return out;
}
INLINE void store_halfs(uint16_t *p, Floats x) {
#if defined(VECTOR_512)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x.part[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(VECTOR_256)
    EACH _mm_storeu_si128((__m128i *)(p + k * 8),
                          _mm256_cvtps_ph((__m256)x.part[k], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    EACH vst1_u16(p + k * 4, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x.part[k])));
#else
    int32_t some[LANES];
    Ints bits = bits_of(x);
    EACH {
        vi sign = (bits.part[k] >> 16) & 0x8000, size = bits.part[k] & 0x7fffffff;
        vi normal = size - (112 << 23);
        normal = (normal + 0xfff + ((normal >> 13) & 1)) >> 13;
        normal = choose(size >= 0x477ff000, (vi){0} + 0x7c00, normal);  // from 65520 on: infinite
        normal = choose(size > 0x7f800000, (vi){0} + 0x7e00, normal);
        vf units = (vf)choose(size < 0x38800000, size, (vi){0}) * 0x1p24f;  // below 2^-14
        vi small = (vi)(units + 12582912.0f) - 0x4b400000;
        bits.part[k] = sign | choose(size < 0x38800000, small, normal);
    }
    store_bytes(some, bits);
    for (int i = 0; i < LANES; i++) p[i] = (uint16_t)some[i];
#endif
}

// The lowest byte of every lane.
INLINE void store_low_bytes(int8_t *p, Ints x) {
#if defined(VECTOR_512)
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)x.part[0]));
#else
    int32_t some[LANES];
    store_bytes(some, x);
    for (int i = 0; i < LANES; i++) p[i] = (int8_t)some[i];
#endif
}

// 16 bytes as integers from 0 to 255.
INLINE Ints load_unsigned(const uint8_t *p) {
#if defined(VECTOR_512)
    Ints out = {{(vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p))}};
    return out;
#else
    int32_t some[LANES];
    for (int i = 0; i < LANES; i++) some[i] = p[i];
    return load_bytes(some);
#endif
}
// 16 numbers of four bits: lane i in the low half of byte i, lane i + 8 in the high half.
INLINE Ints load_nibbles(const uint8_t *p) {
#if defined(VECTOR_512)
    __m128i twice = _mm_set1_epi64x(*(const int64_t *)(const void *)p);
    const __m512i by = _mm512_set_epi32(4, 4, 4, 4, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0);
    __m512i wide = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(twice), by);
    Ints out = {{(vi)_mm512_and_si512(wide, _mm512_set1_epi32(15))}};
    return out;
#else
    int32_t some[LANES];
    for (int i = 0; i < 8; i++) some[i] = p[i] & 15, some[i + 8] = p[i] >> 4;
    return load_bytes(some);
#endif
}

// The first `count` of 16 numbers of a KV cache from element `at` on; the others are 0.
INLINE Floats load_cached(int64_t kind, const void *from, int64_t at, int64_t count) {
    if (kind == CACHE_FLOAT32) return load_some((const float *)from + at, count);
    const uint16_t *half = (const uint16_t *)from + at;
    uint16_t some[LANES] = {0};
    if (count < LANES) half = memcpy(some, half, (size_t)count * 2);
    return kind == CACHE_FLOAT16 ? load_halfs(half) : load_bfloats(half);
}

#endif
