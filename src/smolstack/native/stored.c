// Weights as a checkpoint stores them, (out, in), read in place: never a copy of them in float32.
#include "vector.h"

#include <stdlib.h>

// Rows of x and channels that are summed in registers at once.
#if defined(VECTOR_512)
#define TILE_ROWS 4
#define TILE_CHANNELS 6
#else
#define TILE_ROWS 2
#define TILE_CHANNELS 2
#endif

INLINE Floats stored_lanes(int64_t kind, const void *weight, int64_t at) {
    if (kind == STORED_BFLOAT16) return load_bfloats((const uint16_t *)weight + at);
    if (kind == STORED_FLOAT16) {
        float some[LANES];
        for (int i = 0; i < LANES; i += 8)
            store8(some + i, load8_half((const uint16_t *)weight + at + i));
        return load(some);
    }
    return load((const float *)weight + at);
}

// What is left behind the last whole vector; nothing behind it is touched.
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

// Of each input channel the largest magnitude and the sum of squares over all outputs, factors
// included: (in) each. Returns 1 when memory runs out, else 0.
int stored_sizes(const Stored *s, float *largest, float *squares, int threads) {
    int64_t in = rounded_up(s->in, LANES), each = 3 * in;
    float *memory = calloc((size_t)(each * threads), 4);
    if (!memory) return 1;
#pragma omp parallel for num_threads(threads)
    for (int part = 0; part < threads; part++) {
        float *row = memory + part * each, *most = row + in, *sums = most + in;
        for (int64_t o = s->out * part / threads; o < s->out * (part + 1) / threads; o++) {
            stored_row(s, o, 0, s->in, row);
            for (int64_t i = 0; i < in; i += LANES) {
                Floats w = load(row + i);
                store(most + i, max_lanes(load(most + i), abs_lanes(w)));
                store(sums + i, fma_lanes(w, w, load(sums + i)));
            }
        }
    }
    for (int64_t i = 0; i < s->in; i++) largest[i] = squares[i] = 0;
    for (int part = 0; part < threads; part++) {
        const float *most = memory + part * each + in, *sums = most + in;
        for (int64_t i = 0; i < s->in; i++) {
            largest[i] = most[i] > largest[i] ? most[i] : largest[i];
            squares[i] += sums[i];
        }
    }
    free(memory);
    return 0;
}

INLINE void tile(int rows, int channels, const float *x, int64_t in, const float *w, int64_t wide,
                 const float *bias, float *out, int64_t stride) {
    Floats total[TILE_ROWS][TILE_CHANNELS];
    int64_t i = 0;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < channels; c++) total[r][c] = splat(0);
    for (; i + LANES <= in; i += LANES) {
        Floats some[TILE_CHANNELS];
        UNROLL for (int c = 0; c < channels; c++) some[c] = load(w + c * wide + i);
        UNROLL for (int r = 0; r < rows; r++) {
            Floats own = load(x + r * in + i);
            UNROLL for (int c = 0; c < channels; c++)
                total[r][c] = fma_lanes(own, some[c], total[r][c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < channels; c++) {
            Floats rest = total[r][c];
            if (i < in) rest = fma_lanes(load_some(x + r * in + i, in - i), load(w + c * wide + i), rest);
            out[r * stride + c] = sum_lanes(rest) + (bias ? bias[c] : 0);
        }
}
static void whole_tile(const float *x, int64_t in, const float *w, int64_t wide, const float *bias,
                       float *out, int64_t stride) {
    tile(TILE_ROWS, TILE_CHANNELS, x, in, w, wide, bias, out, stride);
}
static void part_tile(int64_t rows, int64_t channels, const float *x, int64_t in, const float *w,
                      int64_t wide, const float *bias, float *out, int64_t stride) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < channels; c++)
            tile(1, 1, x + r * in, in, w + c * wide, wide, bias ? bias + c : NULL,
                 out + r * stride + c, stride);
}

// out (rows, out) = x (rows, in) · weightᵀ + bias, for a few rows: each weight becomes a float once.
// Returns 1 when memory runs out, else 0.
int stored_product(const Stored *s, const float *bias, const float *x, int64_t rows, float *out,
                   int threads) {
    int64_t wide = rounded_up(s->in, LANES), tiles = (s->out + TILE_CHANNELS - 1) / TILE_CHANNELS;
    float *memory = calloc((size_t)(wide * TILE_CHANNELS * threads), 4);
    if (!memory) return 1;
#pragma omp parallel for num_threads(threads)
    for (int part = 0; part < threads; part++) {
        float *w = memory + part * wide * TILE_CHANNELS;
        for (int64_t t = tiles * part / threads; t < tiles * (part + 1) / threads; t++) {
            int64_t o = t * TILE_CHANNELS, count = least(TILE_CHANNELS, s->out - o), row = 0;
            const float *own = bias ? bias + o : NULL;
            for (int64_t c = 0; c < count; c++) stored_row(s, o + c, 0, s->in, w + c * wide);
            for (; count == TILE_CHANNELS && row + TILE_ROWS <= rows; row += TILE_ROWS)
                whole_tile(x + row * s->in, s->in, w, wide, own, out + row * s->out + o, s->out);
            part_tile(rows - row, count, x + row * s->in, s->in, w, wide, own,
                      out + row * s->out + o, s->out);
        }
    }
    free(memory);
    return 0;
}
