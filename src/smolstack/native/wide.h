// Vectors of 16 floats and of 64 bytes, for many rows at once: AVX-512 with VNNI. Products of
// bfloat16 pairs are one instruction where the processor has it and two otherwise.
#ifndef SMOLSTACK_WIDE_H
#define SMOLSTACK_WIDE_H

#include "smolstack.h"

#include "simd.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define SIMD_WIDE 1

typedef __m512 Wide;

INLINE __mmask16 lanes(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

// e^x to about one part in 10⁷ (Cephes' polynomial).
INLINE Wide exp_wide(Wide x) {
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0f)), _mm512_set1_ps(-87.0f));
    Wide n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    Wide r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    Wide p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// 2^x for x up to 0 to about 6e-06 (a least-squares polynomial): finer than the
// bfloat16 that becomes of it.
INLINE Wide power_of_two(Wide x) {
    Wide n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
    Wide p = _mm512_set1_ps(0.009590241f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.055870273f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.240236776f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693128048f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f)), n);
}

INLINE Wide activate_wide(int64_t activation, Wide x) {
    const Wide one = _mm512_set1_ps(1.0f);
    if (activation == RELU) return _mm512_max_ps(x, _mm512_setzero_ps());
    if (activation == SILU)
        return _mm512_div_ps(x, _mm512_add_ps(one, exp_wide(_mm512_sub_ps(_mm512_setzero_ps(), x))));
    if (activation == GELU_TANH) {  // x (1 + tanh u) / 2 = x / (1 + e^(-2u))
        Wide cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        Wide u = _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, x);
        Wide power = exp_wide(_mm512_mul_ps(u, _mm512_set1_ps(-2.0f * 0.79788456f)));
        return _mm512_div_ps(x, _mm512_add_ps(one, power));
    }
    if (activation == GELU) {
        float some[16];
        _mm512_storeu_ps(some, x);
        activate(GELU, some, 16);
        return _mm512_loadu_ps(some);
    }
    return x;
}

// 16 floats → 16 bfloat16, rounded to nearest even.
INLINE __m256i to_bfloat(Wide x) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
#endif
}

// total += the products of the bfloat16 pairs in each lane.
INLINE Wide add_pairs(Wide total, __m512i a, __m512i b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(total, (__m512bh)a, (__m512bh)b);
#else
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    total = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                            _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), total);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)),
                           _mm512_castsi512_ps(_mm512_and_si512(b, high)), total);
#endif
}

#define TILE_ROWS 8
#define TILE_PANELS 3
#define PANEL 16       // output channels of a panel
#define STEP_BYTES 64  // of a panel, for four bytes of a row
#define AHEAD 2048     // bytes of a panel fetched ahead of their use, from memory for one row
#define SOON 512       // and from the second-level cache for many

typedef __m512i Sums[TILE_ROWS][TILE_PANELS];

INLINE __m512i four_bytes(const char *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}

// `rows` rows times 1 to 3 panels, `apart` bytes from each other: sums of integers, or of floats in
// the same registers. A step is four bytes of a row: four int8 or two bfloat16 numbers.
INLINE void sum_panels(int64_t kind, int rows, int panels, const char *x, int64_t stride,
                       const char *w, int64_t apart, int64_t steps, Sums total) {
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < panels; p++) total[r][p] = _mm512_setzero_si512();
    for (int64_t s = 0; s < steps; s++) {
        __m512i weight[TILE_PANELS];
        UNROLL for (int p = 0; p < panels; p++) {
            weight[p] = _mm512_loadu_si512(w + p * apart + s * STEP_BYTES);
            prefetch(w + p * apart + s * STEP_BYTES + (rows == 1 ? AHEAD : SOON));
        }
        UNROLL for (int r = 0; r < rows; r++) {
            __m512i numbers = four_bytes(x + r * stride + s * 4);
            UNROLL for (int p = 0; p < panels; p++) {
                if (kind == INT8)
                    total[r][p] = _mm512_dpbusd_epi32(total[r][p], weight[p], numbers);
                else
                    total[r][p] = _mm512_castps_si512(
                        add_pairs(_mm512_castsi512_ps(total[r][p]), weight[p], numbers));
            }
        }
    }
}

// The same for one panel of 4-bit weights: a step is eight numbers of a row, the first four in the
// low halves of the bytes; after the four steps of a group its scale is multiplied in.
INLINE void sum_groups(int rows, const char *x, int64_t stride, const int32_t *offsets,
                       const char *w, const uint16_t *scale, int64_t groups, Sums total) {
    const __m512i low = _mm512_set1_epi8(15);
    UNROLL for (int r = 0; r < rows; r++) total[r][0] = _mm512_setzero_si512();
    for (int64_t g = 0; g < groups; g++) {
        __m512i sum[TILE_ROWS];
        UNROLL for (int r = 0; r < rows; r++) sum[r] = _mm512_set1_epi32(offsets[r * groups + g]);
        UNROLL for (int s = 0; s < 4; s++) {
            const char *at = w + (g * 4 + s) * STEP_BYTES, *numbers = x + g * GROUP + s * 8;
            __m512i both = _mm512_loadu_si512(at);
            __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            prefetch(at + AHEAD);
            both = _mm512_and_si512(both, low);
            UNROLL for (int r = 0; r < rows; r++) {
                sum[r] = _mm512_dpbusd_epi32(sum[r], both, four_bytes(numbers + r * stride));
                sum[r] = _mm512_dpbusd_epi32(sum[r], high, four_bytes(numbers + r * stride + 4));
            }
        }
        Wide factor = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(scale + g * PANEL)));
        UNROLL for (int r = 0; r < rows; r++)
            total[r][0] = _mm512_castps_si512(_mm512_fmadd_ps(
                _mm512_cvtepi32_ps(sum[r]), factor, _mm512_castsi512_ps(total[r][0])));
    }
}

// How many panels to take next, so that no tile is left with one where it can be helped.
INLINE int next_panels(int64_t left) { return left == 4 || left == 2 ? 2 : left >= 3 ? 3 : 1; }

#endif
#endif
