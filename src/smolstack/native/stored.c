// Weights in the checkpoint's layout, (out, in), read in place without a float32 copy.
#include "vector_formats.h"

#include <stdlib.h>

// Rows of x and channels accumulated in registers at once.
#if defined(VECTOR_512)
#define TILE_ROWS 4
#define TILE_CHANNELS 6
#else
#define TILE_ROWS 2
#define TILE_CHANNELS 2
#endif

#define STRETCH 512  // inputs

INLINE Floats stored_lanes(int64_t kind, const void *weight, int64_t at) {
    if (kind == STORED_BFLOAT16) return load_bfloats((const uint16_t *)weight + at);
    if (kind == STORED_FLOAT16) return load_halfs((const uint16_t *)weight + at);
    return load((const float *)weight + at);
}

// The remainder after the last whole vector; no memory after it is accessed.
static Floats stored_rest(int64_t kind, const void *weight, int64_t at, int64_t count) {
    char some[LANES * 4] = {0};
    int64_t bytes = kind == STORED_FLOAT32 ? 4 : 2;
    memcpy(some, (const char *)weight + at * bytes, (size_t)(count * bytes));
    return stored_lanes(kind, some, 0);
}

INLINE void row_of(int64_t kind, const Stored *s, int64_t o, int64_t from, int64_t count,
                   float *out) {
    int64_t at = o * s->in + from;
    Floats by = splat(s->by_out ? s->by_out[o] : 1);
    for (int64_t i = 0; i < count; i += LANES) {
        int64_t left = count - i;
        Floats w = left >= LANES ? stored_lanes(kind, s->weight, at + i)
                                 : stored_rest(kind, s->weight, at + i, left);
        w = mul(w, by);
        if (s->by_in) w = mul(w, load_some(s->by_in + from + i, left));
        store_some(out + i, w, left);
    }
}

// `count` weights of output `o` from input `from` on, times the factors of both.
void stored_row(const Stored *s, int64_t o, int64_t from, int64_t count, float *out) {
    if (s->kind == STORED_BFLOAT16)
        row_of(STORED_BFLOAT16, s, o, from, count, out);
    else if (s->kind == STORED_FLOAT16)
        row_of(STORED_FLOAT16, s, o, from, count, out);
    else
        row_of(STORED_FLOAT32, s, o, from, count, out);
}

// The largest magnitude and the sum of squares of each input channel over all outputs, including
// factors: (in) each. Outputs are always summed in SUMS parts, so that the sums do not depend on
// the number of threads. Returns 1 when memory runs out, else 0.
#define SUMS 16
int stored_sizes(const Stored *s, float *largest, float *squares, int threads) {
    int64_t in = rounded_up(s->in, LANES), each = 3 * in;
    float *memory = calloc((size_t)(each * SUMS), 4);
    if (!memory) return 1;
#pragma omp parallel for num_threads(threads)
    for (int part = 0; part < SUMS; part++) {
        float *row = memory + part * each, *most = row + in, *sums = most + in;
        for (int64_t o = s->out * part / SUMS; o < s->out * (part + 1) / SUMS; o++) {
            stored_row(s, o, 0, s->in, row);
            for (int64_t i = 0; i < in; i += LANES) {
                Floats w = load(row + i);
                store(most + i, max_lanes(load(most + i), abs_lanes(w)));
                store(sums + i, fma_lanes(w, w, load(sums + i)));
            }
        }
    }
    for (int64_t i = 0; i < s->in; i++) largest[i] = squares[i] = 0;
    for (int part = 0; part < SUMS; part++) {
        const float *most = memory + part * each + in, *sums = most + in;
        for (int64_t i = 0; i < s->in; i++) {
            largest[i] = most[i] > largest[i] ? most[i] : largest[i];
            squares[i] += sums[i];
        }
    }
    free(memory);
    return 0;
}

// `rows` rows of x by `channels` rows of weights, `count` inputs of each, added to `sums`.
INLINE void tile(int rows, int channels, const float *x, int64_t stride, const float *w,
                 int64_t wide, int64_t count, Floats *sums) {
    Floats total[TILE_ROWS][TILE_CHANNELS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < channels; c++) total[r][c] = sums[r * TILE_CHANNELS + c];
    for (int64_t i = 0; i < count; i += LANES) {
        Floats some[TILE_CHANNELS];
        UNROLL for (int c = 0; c < channels; c++) some[c] = load(w + c * wide + i);
        UNROLL for (int r = 0; r < rows; r++) {
            Floats own = load_some(x + r * stride + i, count - i);
            UNROLL for (int c = 0; c < channels; c++)
                total[r][c] = fma_lanes(own, some[c], total[r][c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < channels; c++) sums[r * TILE_CHANNELS + c] = total[r][c];
}

// All rows by TILE_CHANNELS channels, one stretch of inputs after the other, so that the weights of
// a stretch stay in the L1 cache.
static void multiply_stored(const float *x, int64_t rows, int64_t in, const float *w, int64_t wide,
                            Floats *sums) {
    for (int64_t r = 0; r < rows * TILE_CHANNELS; r++) sums[r] = splat(0);
    for (int64_t from = 0; from < in; from += STRETCH) {
        int64_t count = least(STRETCH, in - from), row = 0;
        for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
            tile(TILE_ROWS, TILE_CHANNELS, x + row * in + from, in, w + from, wide, count,
                 sums + row * TILE_CHANNELS);
        for (; row < rows; row++)
            tile(1, TILE_CHANNELS, x + row * in + from, in, w + from, wide, count,
                 sums + row * TILE_CHANNELS);
    }
}

// out (rows, out) = x (rows, in) · weightᵀ + bias, for a few rows: each weight becomes a float
// once. Returns 1 when memory runs out, else 0.
int stored_product(const Stored *s, const float *bias, const float *x, int64_t rows, float *out,
                   int threads) {
    int64_t wide = rounded_up(s->in, LANES), tiles = (s->out + TILE_CHANNELS - 1) / TILE_CHANNELS;
    int64_t each = TILE_CHANNELS * (wide + rows * LANES) * 4;
    char *memory = calloc((size_t)(each * threads + 64), 1);
    if (!memory) return 1;
#pragma omp parallel for num_threads(threads)
    for (int part = 0; part < threads; part++) {
        Floats *sums = (Floats *)(rounded_up((int64_t)(intptr_t)memory, 64) + part * each);
        float *w = (float *)(sums + rows * TILE_CHANNELS);
        for (int64_t t = tiles * part / threads; t < tiles * (part + 1) / threads; t++) {
            int64_t o = t * TILE_CHANNELS, count = least(TILE_CHANNELS, s->out - o);
            for (int64_t c = 0; c < count; c++) stored_row(s, o + c, 0, s->in, w + c * wide);
            multiply_stored(x, rows, s->in, w, wide, sums);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t c = 0; c < count; c++)
                    out[r * s->out + o + c] =
                        sum_lanes(sums[r * TILE_CHANNELS + c]) + (bias ? bias[o + c] : 0);
        }
    }
    free(memory);
    return 0;
}
