// Linear layers: a share of a layer's channels for prepared rows, and whole layers in parallel.
#include "tiles.h"

#include <stdlib.h>

#define BLOCK_BYTES (192 * 1024)  // weights that stay in the second-level cache between row tiles
#define ROW_BLOCK 48              // rows that one thread quantises and multiplies at a time
#define THIN 16                   // up to so many rows, threads share the channels, not the rows

typedef struct {
    const Linear *linear;
    const Rows *x;
    float *out;
    int64_t stride, from;  // `out` begins with channel `from`
} Task;

typedef void Tile(const Task *, int64_t row, int64_t channel);

// From integer sums (or those of int4's groups) to numbers, and the bias.
static void finish(const Task *t, int rows, int channels, int64_t row, int64_t channel,
                   const float *sums) {
    const Linear *linear = t->linear;
    const float *scale = linear->kind == INT8 ? linear->scale : NULL;
    int quantised = linear->kind == INT8 || linear->kind == INT4;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < channels; c++) {
            float y = sums[r * 4 + c];
            if (quantised) y *= t->x->scale[row + r];
            if (scale) y *= scale[channel + c];
            if (linear->bias) y += linear->bias[channel + c];
            t->out[(row + r) * t->stride + channel + c - t->from] = y;
        }
}

#define INT8_TILE(ROWS, CHANNELS)                                                              \
    static void int8_##ROWS##_##CHANNELS(const Task *t, int64_t row, int64_t channel) {        \
        const Rows *x = t->x;                                                                  \
        int64_t in = t->linear->in;                                                            \
        int32_t whole[ROWS * 4];                                                               \
        float sums[ROWS * 4];                                                                  \
        int8_tile(ROWS, CHANNELS, (const Number *)x->numbers + row * x->stride, x->stride,     \
                  (const int8_t *)t->linear->weight + channel * in, in, whole);                \
        for (int r = 0; r < ROWS; r++)                                                         \
            for (int c = 0; c < CHANNELS; c++)                                                 \
                sums[r * 4 + c] = (float)(whole[r * 4 + c] - zero_point(t, channel + c));      \
        finish(t, ROWS, CHANNELS, row, channel, sums);                                         \
    }
#define INT4_TILE(ROWS, CHANNELS)                                                              \
    static void int4_##ROWS##_##CHANNELS(const Task *t, int64_t row, int64_t channel) {        \
        const Rows *x = t->x;                                                                  \
        int64_t in = t->linear->in, groups = in / GROUP;                                       \
        float sums[ROWS * 4];                                                                  \
        int4_tile(ROWS, CHANNELS, (const int8_t *)x->numbers + row * x->stride, x->stride,     \
                  x->offsets + row * groups * 8,                                               \
                  (const uint8_t *)t->linear->weight + channel * in / 2,                       \
                  (const uint16_t *)t->linear->scale + channel * groups, in, sums);            \
        finish(t, ROWS, CHANNELS, row, channel, sums);                                         \
    }
#define FLOAT_TILE(KIND, WEIGHT, ROWS, CHANNELS)                                               \
    static void KIND##_##ROWS##_##CHANNELS(const Task *t, int64_t row, int64_t channel) {      \
        const Rows *x = t->x;                                                                  \
        float sums[ROWS * 4];                                                                  \
        KIND##_tile(ROWS, CHANNELS, x->floats + row * x->stride, x->stride,                    \
                    (const WEIGHT *)t->linear->weight + channel * t->linear->in, t->linear->in, \
                    sums);                                                                     \
        finish(t, ROWS, CHANNELS, row, channel, sums);                                         \
    }

// What 128 too much in every number of x adds to a sum.
INLINE int32_t zero_point(const Task *t, int64_t channel) {
#if defined(SIMD_VNNI)
    return 128 * t->linear->sums[channel];
#else
    (void)t, (void)channel;
    return 0;
#endif
}

INT8_TILE(1, 1) INT8_TILE(1, 4) INT8_TILE(2, 2) INT8_TILE(4, 2) INT8_TILE(6, 2)
INT4_TILE(1, 1) INT4_TILE(1, 4) INT4_TILE(2, 2) INT4_TILE(4, 2)
FLOAT_TILE(float, float, 1, 1) FLOAT_TILE(float, float, 1, 4)
FLOAT_TILE(float, float, 2, 2) FLOAT_TILE(float, float, 4, 2)
FLOAT_TILE(bfloat, uint16_t, 1, 1) FLOAT_TILE(bfloat, uint16_t, 1, 4)
FLOAT_TILE(bfloat, uint16_t, 2, 2) FLOAT_TILE(bfloat, uint16_t, 4, 2)

// Tiles by kind of weight, widest first: how many rows and channels, and the function.
typedef struct { int rows, channels; Tile *run; } Shape;
static const Shape SHAPES[4][4] = {
    [FLOAT32] = {{4, 2, float_4_2}, {2, 2, float_2_2}, {1, 4, float_1_4}, {1, 1, float_1_1}},
    [BFLOAT16] = {{4, 2, bfloat_4_2}, {2, 2, bfloat_2_2}, {1, 4, bfloat_1_4}, {1, 1, bfloat_1_1}},
    [INT8] = {{6, 2, int8_6_2}, {2, 2, int8_2_2}, {1, 4, int8_1_4}, {1, 1, int8_1_1}},
    [INT4] = {{4, 2, int4_4_2}, {2, 2, int4_2_2}, {1, 4, int4_1_4}, {1, 1, int4_1_1}},
};
static const Shape LONG_INT8 = {4, 2, int8_4_2};  // six long rows would overflow the first cache

static Shape widest(const Linear *linear, int64_t rows) {
    const Shape *shapes = SHAPES[linear->kind];
    if (linear->kind == INT8 && rows >= 4 && (linear->in > 2304 || rows < 6)) return LONG_INT8;
    return rows >= shapes[0].rows ? shapes[0] : rows >= 2 ? shapes[1] : shapes[2];
}

// Channels from .. to of a layer for every row of x; `out` begins with channel `from`.
void multiply(const Linear *linear, const Rows *x, int64_t from, int64_t to, float *out,
              int64_t stride) {
    Task task = {linear, x, out, stride, from};
    int64_t bytes = linear->in * (linear->kind == FLOAT32 ? 4 : linear->kind == BFLOAT16 ? 2 : 1);
    int64_t block = x->rows <= 6 ? to - from : rounded_up(BLOCK_BYTES / bytes + 1, 4);
    Tile *single = SHAPES[linear->kind][3].run;
    for (int64_t begin = from; begin < to; begin += block) {
        int64_t end = least(begin + block, to);
        for (int64_t row = 0; row < x->rows;) {
            Shape shape = widest(linear, x->rows - row);
            int64_t channel = begin;
            for (; channel + shape.channels <= end; channel += shape.channels)
                shape.run(&task, row, channel);
            for (; channel < end; channel++)
                for (int r = 0; r < shape.rows; r++) single(&task, row + r, channel);
            row += shape.rows;
        }
    }
}

static int thin(const Linear *linear, const float *x, int64_t rows, float *out, int threads) {
    void *memory = malloc((size_t)rows_bytes(rows, linear->in));
    if (!memory) return 1;
    Rows prepared;
    lay_out_rows(&prepared, memory, rows, linear->in);
    prepare_rows(&prepared, linear->kind, x, linear->in);
    int64_t share = rounded_up((linear->out + threads - 1) / threads, 16);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t part = 0; part < threads; part++) {
        int64_t from = least(part * share, linear->out), to = least(from + share, linear->out);
        multiply(linear, &prepared, from, to, out + from, linear->out);
    }
    free(memory);
    return 0;
}

// y = activation(x · weightᵀ + bias) for (rows, in) floats; 1 when memory runs out, else 0.
int linear_layer(const Linear *linear, const float *x, int64_t rows, float *out,
                 int64_t activation, int threads) {
    if (rows <= THIN) {
        int failed = thin(linear, x, rows, out, threads);
        if (!failed) activate(activation, out, rows * linear->out);
        return failed;
    }
    int64_t block = least(ROW_BLOCK, rounded_up((rows + threads - 1) / threads, 12));
    int64_t blocks = (rows + block - 1) / block, bytes = rows_bytes(block, linear->in);
    char *memory = malloc((size_t)(bytes * threads));
    if (!memory) return 1;
#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#if defined(_OPENMP)
        thread = omp_get_thread_num();
#endif
        Rows prepared;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < blocks; i++) {
            int64_t first = i * block, count = least(block, rows - first);
            lay_out_rows(&prepared, memory + thread * bytes, count, linear->in);
            prepare_rows(&prepared, linear->kind, x + first * linear->in, linear->in);
            multiply(linear, &prepared, 0, linear->out, out + first * linear->out, linear->out);
            activate(activation, out + first * linear->out, count * linear->out);
        }
    }
    free(memory);
    return 0;
}
