// Sixteen lanes at a time: the one layer between the algorithms and the processor.
//
// `Floats` and `Ints` are 16 lanes of 32 bits, held in as many native vectors as that takes: one
// with AVX-512, two with AVX2, four with SSE2 or NEON. Plain arithmetic is that of GCC's vector
// types; what they cannot say (fused multiply-add, products of bytes, bfloat16 pairs) stands here
// once for every instruction set. Nothing outside this file names an instruction.
#ifndef SMOLSTACK_VECTOR_H
#define SMOLSTACK_VECTOR_H

#include "smolstack.h"

#include "simd.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define VECTOR_512 1
#define NATIVE 64
#elif defined(SIMD_AVX2)
#define VECTOR_256 1
#define NATIVE 32
#else
#define NATIVE 16
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#endif

#define LANES 16
#define PARTS (64 / NATIVE)
#define EACH UNROLL for (int k = 0; k < PARTS; k++)

typedef float vf __attribute__((vector_size(NATIVE)));
typedef int32_t vi __attribute__((vector_size(NATIVE)));
typedef int16_t vs __attribute__((vector_size(NATIVE)));
typedef struct { vf part[PARTS]; } Floats;
typedef struct { vi part[PARTS]; } Ints;

// Whether int8 weights are kept as unsigned bytes, 128 too large: VNNI multiplies unsigned by
// signed bytes.
#if defined(VECTOR_512) || defined(SIMD_VNNI)
#define WEIGHT_OFFSET 128
#else
#define WEIGHT_OFFSET 0
#endif

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

// Sums and largest over the lanes, by halves, in the same order everywhere.
INLINE float sum_lanes(Floats x) {
#if defined(VECTOR_512)
    return _mm512_reduce_add_ps((__m512)x.part[0]);
#else
    float some[LANES];
    store(some, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) some[i] += some[i + half];
    return some[0];
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

// 16 bfloat16 numbers as float32, and back, rounded to nearest even.
INLINE Floats load_bfloats(const uint16_t *p) {
#if defined(VECTOR_512)
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    Floats out = {{(vf)_mm512_slli_epi32(wide, 16)}};
    return out;
#elif defined(VECTOR_256)
    Floats out;
    EACH out.part[k] = (vf)load8_bfloat(p + k * 8);
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
#elif defined(__aarch64__)
    EACH vst1_u16(p + k * 4, vshrn_n_u32((uint32x4_t)bits.part[k], 16));
#else
    uint32_t some[LANES];
    store_bytes(some, bits);
    for (int i = 0; i < LANES; i++) p[i] = (uint16_t)(some[i] >> 16);
#endif
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
INLINE Ints load_halves(const uint8_t *p) {
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

// total += a lane's four weights times the four signed bytes of x. Weights from 0 to 15 are the
// same signed and unsigned; those of int8 are as WEIGHT_OFFSET says, and never -128 where they are
// signed.
INLINE vi dot_part(vi total, vi weight, vi x) {
#if defined(VECTOR_512)
    return (vi)_mm512_dpbusd_epi32((__m512i)total, (__m512i)weight, (__m512i)x);
#elif defined(SIMD_VNNI)
    return (vi)DPBUSD((__m256i)total, (__m256i)weight, (__m256i)x);
#elif defined(VECTOR_256)
    // Unsigned by signed: |w| times x with w's sign. Two products of 127 by 128 fit into 16 bits.
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)weight),
                                         _mm256_sign_epi8((__m256i)x, (__m256i)weight));
    return total + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
    return (vi)vdotq_s32((int32x4_t)total, (int8x16_t)weight, (int8x16_t)x);
#else
    vs even = (((vs)weight << 8) >> 8) * (((vs)x << 8) >> 8);
    vs pairs = even + ((vs)weight >> 8) * ((vs)x >> 8);
    vi both = (vi)pairs;
    return total + ((both << 16) >> 16) + (both >> 16);
#endif
}
INLINE Ints dot(Ints total, Ints weight, vi x) {
    EACH total.part[k] = dot_part(total.part[k], weight.part[k], x);
    return total;
}
INLINE vi four_bytes(const void *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return four - (vi){0};
}

#if defined(__aarch64__)
// Eight bytes of each of two rows.
INLINE vi two_rows(const void *first, const void *second) {
    return (vi)vcombine_s8(vld1_s8(first), vld1_s8(second));
}
#endif

// Whether the processor multiplies two rows of eight bytes by two channels of eight (i8mm).
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define BYTE_MATRICES 1
// The sums of two rows and 16 channels: channels 2k and 2k + 1 of the first row, then of the second.
typedef struct { vi part[2 * PARTS]; } Blocks;

INLINE Blocks no_blocks(void) {
    Blocks out;
    UNROLL for (int k = 0; k < 2 * PARTS; k++) out.part[k] = (vi){0};
    return out;
}
// total += a channel's eight weights, four of them in `low`, times the eight bytes of each row.
INLINE Blocks dot_blocks(Blocks total, Ints low, Ints high, vi rows) {
    EACH {
        int32x4_t a = (int32x4_t)low.part[k], b = (int32x4_t)high.part[k];
        int32x4_t first = (int32x4_t)total.part[2 * k], second = (int32x4_t)total.part[2 * k + 1];
        first = vmmlaq_s32(first, (int8x16_t)rows, (int8x16_t)vzip1q_s32(a, b));
        second = vmmlaq_s32(second, (int8x16_t)rows, (int8x16_t)vzip2q_s32(a, b));
        total.part[2 * k] = (vi)first, total.part[2 * k + 1] = (vi)second;
    }
    return total;
}
INLINE void add_blocks(Blocks blocks, Ints *first, Ints *second) {
    EACH {
        int64x2_t a = (int64x2_t)blocks.part[2 * k], b = (int64x2_t)blocks.part[2 * k + 1];
        first->part[k] += (vi)vtrn1q_s64(a, b), second->part[k] += (vi)vtrn2q_s64(a, b);
    }
}
#else
#define BYTE_MATRICES 0
#endif

// total += the products of the two bfloat16 numbers in each lane.
INLINE vf pairs_part(vf total, vi a, vi b) {
#if defined(VECTOR_512) && defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
#elif BFLOAT_MATRICES
    return (vf)vbfdotq_f32((float32x4_t)total, vreinterpretq_bf16_s32((int32x4_t)a),
                           vreinterpretq_bf16_s32((int32x4_t)b));
#else
    const int32_t high = (int32_t)0xffff0000;
    total = fma_part((vf)(a << 16), (vf)(b << 16), total);
    return fma_part((vf)(a & high), (vf)(b & high), total);
#endif
}
INLINE Floats add_pairs(Floats total, Ints a, vi b) {
    EACH total.part[k] = pairs_part(total.part[k], a.part[k], b);
    return total;
}

#if BFLOAT_MATRICES
// The sums of two rows and eight channels: two channels of the first row, then of the second.
typedef struct { vf part[4]; } PairBlocks;

INLINE PairBlocks no_pair_blocks(void) {
    PairBlocks out;
    UNROLL for (int k = 0; k < 4; k++) out.part[k] = (vf){0};
    return out;
}
// total += a channel's four weights, two of them in `low`, times the four numbers of each row. The
// instruction sums and rounds like two of pairs_part: (total + a·b + c·d) + e·f + g·h.
INLINE PairBlocks add_pair_blocks(PairBlocks total, const vi low[2], const vi high[2], vi rows) {
    bfloat16x8_t x = vreinterpretq_bf16_s32((int32x4_t)rows);
    UNROLL for (int k = 0; k < 2; k++) {
        int32x4_t a = (int32x4_t)low[k], b = (int32x4_t)high[k];
        bfloat16x8_t first = vreinterpretq_bf16_s32(vzip1q_s32(a, b));
        bfloat16x8_t second = vreinterpretq_bf16_s32(vzip2q_s32(a, b));
        total.part[2 * k] = (vf)vbfmmlaq_f32((float32x4_t)total.part[2 * k], x, first);
        total.part[2 * k + 1] = (vf)vbfmmlaq_f32((float32x4_t)total.part[2 * k + 1], x, second);
    }
    return total;
}
// Half a panel of both rows: its first half with `half` 0, its second with 1.
INLINE void put_pair_blocks(PairBlocks blocks, int half, Floats *first, Floats *second) {
    UNROLL for (int k = 0; k < 2; k++) {
        float64x2_t a = (float64x2_t)blocks.part[2 * k], b = (float64x2_t)blocks.part[2 * k + 1];
        first->part[2 * half + k] = (vf)vtrn1q_f64(a, b);
        second->part[2 * half + k] = (vf)vtrn2q_f64(a, b);
    }
}
#endif

// p · 2^n for whole n from -126 to 127.
INLINE Floats times_two_to(Floats p, Floats n) {
#if defined(VECTOR_512)
    Floats out = {{(vf)_mm512_scalef_ps((__m512)p.part[0], (__m512)n.part[0])}};
    return out;
#else
    Ints whole = to_nearest(n);
    EACH whole.part[k] = (whole.part[k] + 127) << 23;
    return mul(p, from_bits(whole));
#endif
}

// e^x to about one part in 10⁷ (Cephes' polynomial).
INLINE Floats exp_lanes(Floats x) {
    x = max_lanes(min_lanes(x, splat(88.0f)), splat(-87.0f));
    Floats n = rounded(mul(x, splat(1.44269504f)));
    Floats r = fma_lanes(n, splat(-0.693359375f), x);
    r = fma_lanes(n, splat(2.12194440e-4f), r);
    Floats p = splat(1.9875691500e-4f);
    p = fma_lanes(p, r, splat(1.3981999507e-3f));
    p = fma_lanes(p, r, splat(8.3334519073e-3f));
    p = fma_lanes(p, r, splat(4.1665795894e-2f));
    p = fma_lanes(p, r, splat(1.6666665459e-1f));
    p = fma_lanes(p, r, splat(5.0000001201e-1f));
    p = fma_lanes(p, mul(r, r), add(r, splat(1.0f)));
    return times_two_to(p, n);
}

// 2^x for x up to 0 to about 6e-06 (a least-squares polynomial): finer than the bfloat16 that
// becomes of it.
INLINE Floats power_of_two(Floats x) {
    x = max_lanes(x, splat(-126.0f));
    Floats n = rounded(x), r = sub(x, n), p = splat(0.009590241f);
    p = fma_lanes(p, r, splat(0.055870273f));
    p = fma_lanes(p, r, splat(0.240236776f));
    p = fma_lanes(p, r, splat(0.693128048f));
    return times_two_to(fma_lanes(p, r, splat(1.0f)), n);
}

INLINE Floats activate_lanes(int64_t activation, Floats x) {
    const Floats one = splat(1.0f);
    if (activation == RELU) return max_lanes(x, splat(0.0f));
    if (activation == SILU) return divide(x, add(one, exp_lanes(sub(splat(0.0f), x))));
    if (activation == GELU_TANH) {  // x (1 + tanh u) / 2 = x / (1 + e^(-2u))
        Floats cube = mul(mul(x, x), x), u = fma_lanes(splat(0.044715f), cube, x);
        return divide(x, add(one, exp_lanes(mul(u, splat(-2.0f * 0.79788456f)))));
    }
    if (activation == GELU) {
        float some[LANES];
        store(some, x);
        activate(GELU, some, LANES);
        return load(some);
    }
    return x;
}

#endif
