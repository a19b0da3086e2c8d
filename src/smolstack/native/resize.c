// Resizes images bit-identically to Pillow: its filters and its fixed-point coefficients (22
// fractional bits), rounded to bytes between the two passes.
//
// A plane is one channel, row by row. Each pass scales columns, whose neighbors are adjacent in
// memory, so that compilers vectorize it; for the horizontal pass the plane is transposed first.
#include "smolstack.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define POINT 22

enum { LANCZOS = 1, BILINEAR = 2, BICUBIC = 3 };  // Pillow's values

static double filter(int64_t kind, double x) {
    x = fabs(x);
    if (kind == BILINEAR) return x < 1 ? 1 - x : 0;
    if (kind == BICUBIC) {  // with a = -0.5
        if (x < 1) return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1;
        if (x < 2) return (((x - 5) * x + 8) * x - 4) * -0.5;
        return 0;
    }
    if (x >= 3) return 0;
    if (x == 0) return 1;
    double a = x * M_PI, b = x / 3 * M_PI;
    return sin(a) / a * (sin(b) / b);
}

static double support_of(int64_t kind) { return kind == BILINEAR ? 1 : kind == BICUBIC ? 2 : 3; }

// For each of `out` positions along an edge of `in` pixels: the first pixel read, the number of
// pixels, and their weights.
typedef struct {
    int64_t most;
    int64_t *first, *count;
    int32_t *weight;  // (out, most)
} Taps;

static int make_taps(Taps *taps, int64_t kind, int64_t in, int64_t out) {
    double scale = (double)in / (double)out, wide = scale < 1 ? 1 : scale;
    double support = support_of(kind) * wide, inverse = 1.0 / wide;
    taps->most = (int64_t)ceil(support) * 2 + 1;
    taps->first = malloc((size_t)out * 16);
    taps->weight = calloc((size_t)(out * taps->most), 4);
    double *weight = malloc((size_t)taps->most * 8);
    if (!taps->first || !taps->weight || !weight) {
        free(taps->first), free(taps->weight), free(weight);
        return 1;
    }
    taps->count = taps->first + out;
    for (int64_t o = 0; o < out; o++) {
        double center = ((double)o + 0.5) * scale, sum = 0;
        int64_t first = (int64_t)(center - support + 0.5), end = (int64_t)(center + support + 0.5);
        first = first < 0 ? 0 : first, end = least(end, in);
        for (int64_t j = 0; j < end - first; j++) {
            weight[j] = filter(kind, ((double)(j + first) - center + 0.5) * inverse);
            sum += weight[j];
        }
        for (int64_t j = 0; j < end - first; j++) {
            double share = (sum != 0 ? weight[j] / sum : weight[j]) * (1 << POINT);
            taps->weight[o * taps->most + j] = (int32_t)(share < 0 ? share - 0.5 : share + 0.5);
        }
        taps->first[o] = first, taps->count[o] = end - first;
    }
    free(weight);
    return 0;
}

static void drop_taps(Taps *taps) { free(taps->first), free(taps->weight); }

static inline uint8_t byte_of(int32_t x) {
    x >>= POINT;
    return (uint8_t)(x < 0 ? 0 : x > 255 ? 255 : x);
}

#define RUN 256  // columns summed at a time

// Mixes `count` rows from `from` on into one row of `width` bytes.
static void mix_rows(const uint8_t *from, int64_t width, int64_t count, const int32_t *weight,
                     uint8_t *to) {
    int32_t sum[RUN];
    for (int64_t begin = 0; begin < width; begin += RUN) {
        int64_t run = least(RUN, width - begin);
        for (int64_t i = 0; i < run; i++) sum[i] = 1 << (POINT - 1);
        for (int64_t j = 0; j < count; j++) {
            const uint8_t *row = from + j * width + begin;
            for (int64_t i = 0; i < run; i++) sum[i] += weight[j] * row[i];
        }
        for (int64_t i = 0; i < run; i++) to[begin + i] = byte_of(sum[i]);
    }
}

// Transposes a plane (rows, columns) to (columns, rows), in squares that fit into the cache.
static void turn_over(const uint8_t *from, int64_t rows, int64_t columns, uint8_t *to,
                      int64_t first, int64_t end) {
    for (int64_t y = 0; y < rows; y += 16)
        for (int64_t x = first; x < end; x++)
            for (int64_t i = y; i < least(y + 16, rows); i++) to[x * rows + i] = from[i * columns + x];
}

#define BAND 64  // rows per work item

// In a parallel region: the rows of a plane (rows, width) mixed to (out, width).
static void scale_down(const uint8_t *from, int64_t width, const Taps *taps, int64_t out,
                       uint8_t *to) {
#pragma omp for
    for (int64_t y = 0; y < out; y++)
        mix_rows(from + taps->first[y] * width, width, taps->count[y],
                 taps->weight + y * taps->most, to + y * width);
}

// In a parallel region: transposes a plane (rows, columns).
static void turn_plane(const uint8_t *from, int64_t rows, int64_t columns, uint8_t *to) {
#pragma omp for
    for (int64_t band = 0; band < (columns + BAND - 1) / BAND; band++)
        turn_over(from, rows, columns, to, band * BAND, least((band + 1) * BAND, columns));
}

// Planes (planes, height, width) scaled to (planes, high, wide), rows first or columns first.
// Returns 1 when memory runs out, else 0.
int resize_planes(const uint8_t *from, int64_t planes, int64_t height, int64_t width, int64_t high,
                  int64_t wide, int64_t kind, int vertical_first, uint8_t *to, int threads) {
    int64_t rows = vertical_first ? high : height;  // while the columns are scaled
    uint8_t *memory = malloc((size_t)(rows * (2 * width + 2 * wide)));
    Taps across, down;
    if (!memory) return 1;
    if (make_taps(&across, kind, width, wide)) return free(memory), 1;
    if (make_taps(&down, kind, height, high)) return free(memory), drop_taps(&across), 1;
    uint8_t *turned = memory, *scaled = turned + rows * width, *beside = scaled + rows * wide;
#pragma omp parallel num_threads(threads)
    for (int64_t plane = 0; plane < planes; plane++) {
        const uint8_t *own = from + plane * height * width;
        uint8_t *out = to + plane * high * wide;
        if (vertical_first) scale_down(own, width, &down, high, beside);
        turn_plane(vertical_first ? beside : own, rows, width, turned);
        scale_down(turned, rows, &across, wide, scaled);
        turn_plane(scaled, wide, rows, vertical_first ? out : beside);
        if (!vertical_first) scale_down(beside, wide, &down, high, out);
    }
    free(memory), drop_taps(&across), drop_taps(&down);
    return 0;
}

// Converts bytes to floats with a table of 256 entries for each of three channels: (count, 3, size)
// each.
void look_up(const float *table, const uint8_t *from, int64_t count, int64_t size, float *to,
             int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t part = 0; part < count * 3; part++) {
        const float *own = table + part % 3 * 256;
        for (int64_t i = part * size; i < (part + 1) * size; i++) to[i] = own[from[i]];
    }
}
