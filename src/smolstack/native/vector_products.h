// Products of bytes and of pairs of bfloat16 numbers.
#ifndef SMOLSTACK_VECTOR_PRODUCTS_H
#define SMOLSTACK_VECTOR_PRODUCTS_H

#include "vector_formats.h"

#if defined(VECTOR_256) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define VECTOR_VNNI 1
#define DPBUSD _mm256_dpbusd_epi32
#elif defined(VECTOR_256) && defined(__AVXVNNI__)
#define VECTOR_VNNI 1
#define DPBUSD _mm256_dpbusd_avx_epi32
#endif

// Whether int8 weights are kept as unsigned bytes, 128 too large: VNNI multiplies unsigned by
// signed bytes.
#if defined(VECTOR_512) || defined(VECTOR_VNNI)
#define WEIGHT_OFFSET 128
#else
#define WEIGHT_OFFSET 0
#endif

// total += a lane's four weights times the four signed bytes of x. Weights from 0 to 15 are the
// same signed and unsigned; those of int8 are as WEIGHT_OFFSET says, and never -128 where they are
// signed.
INLINE vi dot_part(vi total, vi weight, vi x) {
#if defined(VECTOR_512)
    return (vi)_mm512_dpbusd_epi32((__m512i)total, (__m512i)weight, (__m512i)x);
#elif defined(VECTOR_VNNI)
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

#endif
