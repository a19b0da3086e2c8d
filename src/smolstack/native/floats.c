// Products in float32. Weights keep the checkpoint's layout, (out, in). A decode step reads them along
// the input channels (`tile`). For many rows, the rows are laid out as panels of 16, and each weight
// is multiplied by a vector of rows (`sum_singles`, the inner loop).
#include "product.h"

#define FAR 1536  // prefetch distance in bytes of weights
#define SOON 256  // prefetch distance in floats of a panel

// The remainder of a row after whole vectors; rare, so it is a separate function.
static __attribute__((noinline)) float rest(const float *x, const float *w, int64_t from,
                                            int64_t to, float sum) {
    for (int64_t i = from; i < to; i++) sum += x[i] * w[i];
    return sum;
}

// Rows and channels of a decode step that are summed in registers at once. Fewer rows take one
// channel at a time, which reads the weights as one stream.
#if defined(VECTOR_512)
#define TILE_ROWS 4
#define TILE_CHANNELS 4
#elif defined(VECTOR_256) || defined(__aarch64__)
#define TILE_ROWS 2
#define TILE_CHANNELS 2
#else
#define TILE_ROWS 2
#define TILE_CHANNELS 1
#endif
#define MOST_TILE 4

// `rows` rows of x by `channels` rows of the weight; a row's result does not depend on the tile.
INLINE void tile(int rows, int channels, const Linear *linear, const float *x, int64_t x_stride,
                 int64_t channel, float *out, int64_t stride) {
    const float *w = (const float *)linear->weight + channel * linear->in;
    int64_t in = linear->in, i = 0;
    Floats total[MOST_TILE][MOST_TILE];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < channels; c++) total[r][c] = splat(0);
    for (; i + LANES <= in; i += LANES) {
        UNROLL for (int c = 0; c < channels; c++) {
            Floats weight = load(w + c * in + i);
            prefetch(w + c * in + i + FAR / 4);
            UNROLL for (int r = 0; r < rows; r++)
                total[r][c] = fma_lanes(load(x + r * x_stride + i), weight, total[r][c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < channels; c++) {
        float sum = sum_lanes(total[r][c]);
        if (i < in) sum = rest(x + r * x_stride, w + c * in, i, in, sum);
        if (linear->bias) sum += linear->bias[channel + c];
        out[r * stride + c] = sum;
    }
}

#define TILE(NAME, ROWS, CHANNELS)                                                               \
    static void NAME(const Linear *linear, const float *x, int64_t x_stride, int64_t channel,    \
                     float *out, int64_t stride) {                                               \
        tile(ROWS, CHANNELS, linear, x, x_stride, channel, out, stride);                         \
    }
TILE(one_channel, 1, 1) TILE(last_row, 1, TILE_CHANNELS) TILE(some_rows, TILE_ROWS, TILE_CHANNELS)
typedef void Tile(const Linear *, const float *, int64_t, int64_t, float *, int64_t);

// Channels from .. to of a layer for `rows` rows of x; `out` begins with channel `from`. All rows
// are multiplied by some channels before the next ones are read.
void multiply_floats(const Linear *linear, const float *x, int64_t rows, int64_t x_stride,
                     int64_t from, int64_t to, float *out, int64_t stride) {
    int64_t channel = from, row, together;
    for (; rows >= TILE_ROWS && channel + TILE_CHANNELS <= to; channel += TILE_CHANNELS)
        for (row = 0; row < rows; row += together) {
            int many = row + TILE_ROWS <= rows;
            Tile *run = many ? some_rows : last_row;
            together = many ? TILE_ROWS : 1;
            run(linear, x + row * x_stride, x_stride, channel, out + row * stride + channel - from,
                stride);
        }
    for (; channel < to; channel++)
        for (row = 0; row < rows; row++)
            one_channel(linear, x + row * x_stride, x_stride, channel,
                        out + row * stride + channel - from, stride);
}

// Multiplies `rows` rows of x by the 16 lanes of `panels` panels. Steps are summed in order, so a
// result does not depend on the tile that it is computed in.
INLINE void sum_singles(int rows, int panels, const float *x, int64_t stride, const float *w,
                        int64_t apart, int64_t steps, Floats total[FLOAT_ROWS][FLOAT_PANELS]) {
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < panels; p++) total[r][p] = splat(0);
    for (int64_t s = 0; s < steps; s++) {
        Floats lanes[FLOAT_PANELS];
        UNROLL for (int p = 0; p < panels; p++) lanes[p] = load(w + p * apart + s * LANES);
        UNROLL for (int p = 0; p < panels; p++) prefetch(w + p * apart + s * LANES + SOON);
        // Prefetches each cache line of the next rows. The hardware does not: it stops at the end of
        // a page, which holds one or two rows.
        if (rows == FLOAT_ROWS)
            prefetch(x + (FLOAT_ROWS + (s & (FLOAT_ROWS - 1))) * stride + (s & ~(LANES - 1)));
        UNROLL for (int r = 0; r < rows; r++) {
            Floats number = splat(x[r * stride + s]);
            UNROLL for (int p = 0; p < panels; p++)
                total[r][p] = fma_lanes(number, lanes[p], total[r][p]);
        }
    }
}

#define SINGLES(ROWS, PANELS)                                                                     \
    static void singles_##ROWS##_##PANELS(const float *x, int64_t stride, const float *w,        \
                                          int64_t apart, int64_t steps, float *out,              \
                                          int64_t wide) {                                        \
        Floats total[FLOAT_ROWS][FLOAT_PANELS];                                                  \
        sum_singles(ROWS, PANELS, x, stride, w, apart, steps, total);                            \
        UNROLL for (int r = 0; r < ROWS; r++)                                                    \
            UNROLL for (int p = 0; p < PANELS; p++)                                              \
                store(out + r * wide + p * LANES, total[r][p]);                                  \
    }
typedef void Singles(const float *, int64_t, const float *, int64_t, int64_t, float *, int64_t);
#if FLOAT_ROWS == 8
SINGLES(1, 1) SINGLES(1, 2) SINGLES(1, 3) SINGLES(8, 1) SINGLES(8, 2) SINGLES(8, 3)
static Singles *const ONE[] = {singles_1_1, singles_1_2, singles_1_3};
static Singles *const MANY[] = {singles_8_1, singles_8_2, singles_8_3};
#elif FLOAT_ROWS == 4
SINGLES(1, 1) SINGLES(4, 1)
static Singles *const ONE[] = {singles_1_1}, *const MANY[] = {singles_4_1};
#else
SINGLES(1, 1) SINGLES(2, 1)
static Singles *const ONE[] = {singles_1_1}, *const MANY[] = {singles_2_1};
#endif

void multiply_singles(const float *x, int64_t stride, const float *w, int64_t apart, int64_t steps,
                      int64_t rows, int64_t panels, float *out, int64_t wide) {
    for (int64_t panel = 0, count; panel < panels; panel += count) {
        count = least(FLOAT_PANELS, panels - panel);
        for (int64_t row = 0; row < rows; row += FLOAT_ROWS)
            MANY[count - 1](x + row * stride, stride, w + panel * apart, apart, steps,
                            out + row * wide + panel * LANES, wide);
    }
}

// Transposes (rows, columns), both multiples of four.
typedef int32_t FourInts __attribute__((vector_size(16)));
#if defined(__clang__)
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (FourInts){i, j, k, l})
#endif
static void transpose(const float *from, int64_t from_stride, int64_t rows, int64_t columns,
                      float *to, int64_t to_stride) {
    for (int64_t i = 0; i < rows; i += 4)
        for (int64_t j = 0; j < columns; j += 4) {
            Four a, b, c, d, ab, cd, AB, CD;
            memcpy(&a, from + i * from_stride + j, 16);
            memcpy(&b, from + (i + 1) * from_stride + j, 16);
            memcpy(&c, from + (i + 2) * from_stride + j, 16);
            memcpy(&d, from + (i + 3) * from_stride + j, 16);
            ab = SHUFFLE(a, b, 0, 4, 1, 5), AB = SHUFFLE(a, b, 2, 6, 3, 7);
            cd = SHUFFLE(c, d, 0, 4, 1, 5), CD = SHUFFLE(c, d, 2, 6, 3, 7);
            a = SHUFFLE(ab, cd, 0, 1, 4, 5), b = SHUFFLE(ab, cd, 2, 3, 6, 7);
            c = SHUFFLE(AB, CD, 0, 1, 4, 5), d = SHUFFLE(AB, CD, 2, 3, 6, 7);
            memcpy(to + j * to_stride + i, &a, 16);
            memcpy(to + (j + 1) * to_stride + i, &b, 16);
            memcpy(to + (j + 2) * to_stride + i, &c, 16);
            memcpy(to + (j + 3) * to_stride + i, &d, 16);
        }
}

void prepare_lanes(Block *block, int64_t in, int64_t row, const float *x, int64_t stride) {
    float *panel = (float *)block->numbers + row * in;
    int64_t rows = least(LANES, block->rows - row), whole = in / 4 * 4, four = rows / 4 * 4;
    if (rows < LANES) memset(panel, 0, (size_t)(in * LANES) * 4);
    transpose(x, stride, four, whole, panel, LANES);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = r < four ? whole : 0; i < in; i++) panel[i * LANES + r] = x[r * stride + i];
}

void multiply_lanes(const Target *t, int64_t to) {
    const Linear *linear = t->linear;
    const float *weight = linear->weight, *x = (const float *)t->x->numbers;
    int64_t in = linear->in, rows = rounded_up(t->x->rows, LANES);
    for (int64_t channel = t->from; channel < to; channel += PANEL)
        for (int64_t row = 0; row < rows; row += FLOAT_PANELS * LANES) {
            float by_channel[PANEL * FLOAT_PANELS * LANES] __attribute__((aligned(64)));
            float sums[PANEL * FLOAT_PANELS * LANES] __attribute__((aligned(64)));
            int64_t panels = least(FLOAT_PANELS, (rows - row) / LANES), wide = panels * LANES;
            int64_t count = least(PANEL, linear->out - channel), c = 0;
            const float *w = weight + channel * in, *lanes = x + row * in;
            if (count < PANEL) memset(by_channel, 0, sizeof by_channel);
            for (; c + FLOAT_ROWS <= count; c += FLOAT_ROWS)
                MANY[panels - 1](w + c * in, in, lanes, in * LANES, in, by_channel + c * wide, wide);
            for (; c < count; c++)
                ONE[panels - 1](w + c * in, in, lanes, in * LANES, in, by_channel + c * wide, wide);
            transpose(by_channel, wide, PANEL, wide, sums, PANEL);
            put_tile(t, wide, 1, row, channel, sums);
        }
}
