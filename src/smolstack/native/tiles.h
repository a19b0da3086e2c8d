// Tiles of a linear layer: ROWS rows of x by CHANNELS rows of the weight, summed in registers.
// The numbers of rows and channels are constants wherever a tile is used, so every loop over them
// is unrolled. A row's result does not depend on the tile that it is computed in.
#ifndef SMOLSTACK_TILES_H
#define SMOLSTACK_TILES_H

#include "smolstack.h"

#include "simd.h"

// Holds a sum in its register: left alone, gcc multiplies first, adds later and spills the sums.
#define KEEP(x) __asm__("" : "+x"(x))
#define FAR 1536  // bytes of weights fetched ahead of their use

#if defined(SIMD_VNNI)
typedef uint8_t Number;
#else
typedef int16_t Number;
#endif

// What is left of a row after whole vectors; rare, so it is kept out of the tiles.
#define REST(name, X, W, SUM, weight)                                                         \
    static __attribute__((noinline, unused)) SUM name(const X *x, const W *w, int64_t from,   \
                                                      int64_t to, SUM sum) {                  \
        for (int64_t j = from; j < to; j++) sum += x[j] * weight;                             \
        return sum;                                                                           \
    }
REST(float_rest, float, float, float, w[j])
REST(bfloat_rest, float, uint16_t, float, load_bfloat(w + j))
REST(int8_rest, Number, int8_t, int32_t, w[j])

INLINE void float_tile(int rows, int channels, const float *x, int64_t stride, const float *w,
                       int64_t in, float *sums) {
    Float8 total[6][4];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < channels; c++) total[r][c] = zero8();
    int64_t i = 0;
    for (; i + 8 <= in; i += 8) {
        UNROLL for (int c = 0; c < channels; c++) {
            Float8 weight = load8(w + c * in + i);
            prefetch(w + c * in + i + FAR / 4);
            UNROLL for (int r = 0; r < rows; r++)
                total[r][c] = fma8(load8(x + r * stride + i), weight, total[r][c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < channels; c++) {
        float sum = sum8(total[r][c]);
        if (i < in) sum = float_rest(x + r * stride, w + c * in, i, in, sum);
        sums[r * 4 + c] = sum;
    }
}

INLINE void bfloat_tile(int rows, int channels, const float *x, int64_t stride,
                        const uint16_t *w, int64_t in, float *sums) {
    Float8 total[6][4];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < channels; c++) total[r][c] = zero8();
    int64_t i = 0;
    for (; i + 8 <= in; i += 8) {
        UNROLL for (int c = 0; c < channels; c++) {
            Float8 weight = load8_bfloat(w + c * in + i);
            prefetch(w + c * in + i + FAR / 2);
            UNROLL for (int r = 0; r < rows; r++)
                total[r][c] = fma8(load8(x + r * stride + i), weight, total[r][c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < channels; c++) {
        float sum = sum8(total[r][c]);
        if (i < in) sum = bfloat_rest(x + r * stride, w + c * in, i, in, sum);
        sums[r * 4 + c] = sum;
    }
}

#if defined(SIMD_AVX2)

INLINE int32_t sum_lanes(__m256i x) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

// One step of int8: 32 products with VNNI; without it 16, in 16 bits, which no sum overflows.
#if defined(SIMD_VNNI)
#define STEP 32
INLINE __m256i load_weights(const int8_t *w) { return _mm256_loadu_si256((const __m256i *)w); }
INLINE __m256i add_products(__m256i total, __m256i x, __m256i w) { return DPBUSD(total, x, w); }
#else
#define STEP 16
INLINE __m256i load_weights(const int8_t *w) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
}
INLINE __m256i add_products(__m256i total, __m256i x, __m256i w) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(x, w));
}
#endif

INLINE void int8_tile(int rows, int channels, const Number *x, int64_t stride, const int8_t *w,
                      int64_t in, int32_t *sums) {
    __m256i total[6][4];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < channels; c++) total[r][c] = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + STEP <= in; i += STEP) {
        __m256i weight[4];
        UNROLL for (int c = 0; c < channels; c++) {
            weight[c] = load_weights(w + c * in + i);
            if (rows < 4) prefetch(w + c * in + i + FAR);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            __m256i numbers = _mm256_loadu_si256((const __m256i *)(x + r * stride + i));
            KEEP(numbers);
            UNROLL for (int c = 0; c < channels; c++) {
                total[r][c] = add_products(total[r][c], numbers, weight[c]);
                KEEP(total[r][c]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < channels; c++) {
        int32_t sum = sum_lanes(total[r][c]);
        if (i < in) sum = int8_rest(x + r * stride, w + c * in, i, in, sum);
        sums[r * 4 + c] = sum;
    }
}

// A group's 32 weights, 0 to 15, times 32 numbers of x, less 8 times the numbers.
INLINE __m256i group_products(__m256i weights, const int8_t *x, const int32_t *offsets) {
    __m256i numbers = _mm256_loadu_si256((const __m256i *)x);
    __m256i offset = _mm256_loadu_si256((const __m256i *)offsets);
#if defined(SIMD_VNNI)
    return DPBUSD(offset, weights, numbers);
#else
    __m256i pairs = _mm256_maddubs_epi16(weights, numbers);
    return _mm256_add_epi32(offset, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

INLINE __m256i load_group(const uint8_t *w) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)w);
    __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes),
                                           _mm_srli_epi16(bytes, 4), 1);
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

INLINE void load_scales(const uint16_t *from, int64_t count, float *to) {
    uint16_t some[8] = {0};
    if (count < 8) memcpy(some, from, (size_t)count * 2);
    store8(to, load8_half(count < 8 ? some : from));
}

INLINE void int4_tile(int rows, int channels, const int8_t *x, int64_t stride,
                      const int32_t *offsets, const uint8_t *w, const uint16_t *scale, int64_t in,
                      float *sums) {
    int64_t groups = in / GROUP;
    Float8 total[4][4];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < channels; c++) total[r][c] = zero8();
    for (int64_t some = 0; some < groups; some += 8) {
        float scales[4][8];
        int64_t end = least(8, groups - some);
        UNROLL for (int c = 0; c < channels; c++)
            load_scales(scale + c * groups + some, end, scales[c]);
        for (int64_t g = some; g < some + end; g++) {
            UNROLL for (int c = 0; c < channels; c++) {
                const uint8_t *at = w + c * (in / 2) + g * (GROUP / 2);
                __m256i weights = load_group(at);
                Float8 factor = splat8(scales[c][g - some]);
                if (rows < 4) prefetch(at + FAR);
                UNROLL for (int r = 0; r < rows; r++) {
                    __m256i products = group_products(weights, x + r * stride + g * GROUP,
                                                      offsets + (r * groups + g) * 8);
                    total[r][c] = fma8(_mm256_cvtepi32_ps(products), factor, total[r][c]);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < channels; c++) sums[r * 4 + c] = sum8(total[r][c]);
}

#else

INLINE void int8_tile(int rows, int channels, const Number *x, int64_t stride, const int8_t *w,
                      int64_t in, int32_t *sums) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < channels; c++) {
            int32_t sum = 0;
            for (int64_t i = 0; i < in; i++) sum += x[r * stride + i] * w[c * in + i];
            sums[r * 4 + c] = sum;
        }
}

INLINE void int4_tile(int rows, int channels, const int8_t *x, int64_t stride,
                      const int32_t *offsets, const uint8_t *w, const uint16_t *scale, int64_t in,
                      float *sums) {
    int64_t groups = in / GROUP;
    (void)offsets;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < channels; c++) {
            float total = 0;
            for (int64_t g = 0; g < groups; g++) {
                const uint8_t *at = w + c * (in / 2) + g * (GROUP / 2);
                const int8_t *numbers = x + r * stride + g * GROUP;
                int32_t sum = 0;
                for (int i = 0; i < GROUP / 2; i++)
                    sum += ((at[i] & 15) - 8) * numbers[i] +
                           ((at[i] >> 4) - 8) * numbers[i + GROUP / 2];
                total += (float)sum * half_to_float(scale[c * groups + g]);
            }
            sums[r * 4 + c] = total;
        }
}

#endif
#endif
