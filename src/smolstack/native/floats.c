// Products with float32 weights in the checkpoint's layout, (out, in), for the few rows of a decode
// step.
#include "simd.h"
#include "smolstack.h"

#define FAR 1536  // prefetch distance in bytes

// The remainder of a row after whole vectors; rare, so it is a separate function.
static __attribute__((noinline)) float rest(const float *x, const float *w, int64_t from,
                                            int64_t to, float sum) {
    for (int64_t i = from; i < to; i++) sum += x[i] * w[i];
    return sum;
}

// ROWS rows of x by CHANNELS rows of the weight, accumulated in registers; a row's result does not
// depend on the tile.
INLINE void tile(int rows, int channels, const Linear *linear, const float *x, int64_t x_stride,
                 int64_t channel, float *out, int64_t stride) {
    const float *w = (const float *)linear->weight + channel * linear->in;
    int64_t in = linear->in, i = 0;
    Float8 total[4][4];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < channels; c++) total[r][c] = zero8();
    for (; i + 8 <= in; i += 8) {
        UNROLL for (int c = 0; c < channels; c++) {
            Float8 weight = load8(w + c * in + i);
            prefetch(w + c * in + i + FAR / 4);
            UNROLL for (int r = 0; r < rows; r++)
                total[r][c] = fma8(load8(x + r * x_stride + i), weight, total[r][c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < channels; c++) {
        float sum = sum8(total[r][c]);
        if (i < in) sum = rest(x + r * x_stride, w + c * in, i, in, sum);
        if (linear->bias) sum += linear->bias[channel + c];
        out[r * stride + c] = sum;
    }
}

#define TILE(ROWS, CHANNELS)                                                                      \
    static void tile_##ROWS##_##CHANNELS(const Linear *linear, const float *x, int64_t x_stride, \
                                         int64_t channel, float *out, int64_t stride) {          \
        tile(ROWS, CHANNELS, linear, x, x_stride, channel, out, stride);                         \
    }
TILE(1, 1) TILE(1, 4) TILE(2, 2) TILE(4, 2)
typedef void Tile(const Linear *, const float *, int64_t, int64_t, float *, int64_t);
typedef struct { int rows, channels; Tile *run; } Shape;
static const Shape SHAPES[] = {{4, 2, tile_4_2}, {2, 2, tile_2_2}, {1, 4, tile_1_4}};

// Channels from .. to of a layer for `rows` rows of x; `out` begins with channel `from`.
void multiply_floats(const Linear *linear, const float *x, int64_t rows, int64_t x_stride,
                     int64_t from, int64_t to, float *out, int64_t stride) {
    for (int64_t row = 0; row < rows;) {
        const Shape *shape = rows - row >= 4 ? SHAPES : rows - row >= 2 ? SHAPES + 1 : SHAPES + 2;
        const float *own = x + row * x_stride;
        float *to_row = out + row * stride;
        int64_t channel = from;
        for (; channel + shape->channels <= to; channel += shape->channels)
            shape->run(linear, own, x_stride, channel, to_row + channel - from, stride);
        for (; channel < to; channel++)
            for (int r = 0; r < shape->rows; r++)
                tile_1_1(linear, own + r * x_stride, x_stride, channel,
                         to_row + r * stride + channel - from, stride);
        row += shape->rows;
    }
}
