// Rounds, packs, unpacks and multiplies weights of odd shapes, for the sanitizers to watch, and
// compares with sums in double precision. Prints a digest of what must be the same in every set of
// instructions: the integers, and the products of them. Ends with 0 when all is near.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "smolstack.h"

int64_t panel_bytes(int64_t kind, int64_t in, int64_t out);
void unpack_panels(int64_t kind, const void *panels, int64_t in, int64_t out, void *words,
                   int64_t row_bytes, int threads);
int round_weight(int64_t bits, const Stored *s, const float *importance, int64_t group, void *panels,
                 uint8_t *words, int64_t row_bytes, uint16_t *scales, uint8_t *zeros, int threads);
int stored_sizes(const Stored *s, float *largest, float *squares, int threads);
int stored_product(const Stored *s, const float *bias, const float *x, int64_t rows, float *out,
                   int threads);

static uint32_t state = 1;
static float drawn(void) {
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / (1 << 23) - 1;
}
static uint16_t high_half(float x) {
    union { float number; uint32_t bits; } both = {x};
    return (uint16_t)(both.bits >> 16);
}

static uint64_t digest = 1469598103934665603u;  // FNV-1a
static void add(const void *data, size_t bytes) {
    const uint8_t *from = data;
    for (size_t i = 0; i < bytes; i++) digest = (digest ^ from[i]) * 1099511628211u;
}

// The largest distance of `found` from x · weightᵀ, relative to the largest sum of magnitudes.
static double distance(const float *x, const float *weight, int64_t rows, int64_t in, int64_t out,
                       const float *found) {
    double most = 0, largest = 1e-30;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t o = 0; o < out; o++) {
            double sum = 0, size = 0;
            for (int64_t i = 0; i < in; i++) {
                double product = (double)x[r * in + i] * weight[o * in + i];
                sum += product, size += fabs(product);
            }
            most = fmax(most, fabs(sum - found[r * out + o])), largest = fmax(largest, size);
        }
    return most / largest;
}

static int check(int64_t rows, int64_t in, int64_t out, int64_t bits, int64_t group, int fine,
                 int threads) {
    int64_t groups = (in + group - 1) / group, kind = bits == 8 ? INT8 : INT4;
    int64_t row_bytes = (in * bits + 31) / 32 * 4, channels = rounded_up(out, 16);
    uint16_t *stored = malloc((size_t)(out * in * 2)), *scales = malloc((size_t)(out * groups * 2));
    float *floats = malloc((size_t)(out * in * 4)), *x = malloc((size_t)(rows * in * 4));
    float *importance = malloc((size_t)(in * 4)), *sizes = malloc((size_t)(in * 8));
    float *y = malloc((size_t)(rows * out * 4));
    int64_t bytes = panel_bytes(kind, in, out) + channels * groups * 2 + channels * groups / 2;
    char *panels = aligned_alloc(64, (size_t)rounded_up(bytes, 64));
    uint8_t *words = malloc((size_t)(out * row_bytes)), *again = malloc((size_t)(out * row_bytes));
    uint8_t *zeros = malloc((size_t)(out * groups));
    for (int64_t i = 0; i < out * in; i++) {
        stored[i] = high_half(drawn());
        union { uint32_t bits; float number; } both = {(uint32_t)stored[i] << 16};
        floats[i] = both.number;
    }
    for (int64_t i = 0; i < rows * in; i++) x[i] = drawn();
    for (int64_t i = 0; i < in; i++) importance[i] = 1;
    const Stored s = {STORED_BFLOAT16, in, out, stored, NULL, NULL};
    const Norm none = {NO_NORM, 0, NULL, NULL};
    int failed = round_weight(bits, &s, importance, group, panels, NULL, 0, NULL, NULL, threads);
    failed |= round_weight(bits, &s, importance, group, NULL, words, row_bytes, scales, zeros, threads);
    unpack_panels(kind, panels, in, out, again, row_bytes, threads);
    for (int64_t i = 0; i < out * in * bits / 8 / out; i++) failed |= words[i] != again[i];
    failed |= stored_sizes(&s, sizes, sizes + in, threads);
    failed |= stored_product(&s, NULL, x, rows, y, threads);
    double exact = distance(x, floats, rows, in, out, y);
    Linear linear = {kind, in, out, group, fine, panels, NULL, NULL, NULL};
    linear.scale = (const uint16_t *)(const void *)(panels + panel_bytes(kind, in, out));
    linear.zeros = (const uint8_t *)(linear.scale + channels * groups);
    failed |= dense_rows(&linear, &none, x, rows, NONE, NULL, y, threads);
    double rounded = distance(x, floats, rows, in, out, y);
    add(words, (size_t)(out * row_bytes)), add(scales, (size_t)(out * groups * 2));
    if (bits == 4) add(zeros, (size_t)(out * groups));
    add(y, (size_t)(rows * out * 4));
    failed |= exact > 1e-5 || rounded > (bits == 8 ? 0.02 : 0.1);
    if (failed)
        printf("%lld bits, %lld x %lld x %lld: %g, %g\n", (long long)bits, (long long)rows,
               (long long)in, (long long)out, exact, rounded);
    free(stored), free(scales), free(floats), free(x), free(importance), free(sizes), free(y);
    free(panels), free(words), free(again), free(zeros);
    return failed;
}

int main(void) {
    const int64_t shapes[][3] = {{1, 8, 1},    {1, 24, 17},   {3, 40, 33},  {9, 72, 48},
                                 {17, 136, 50}, {2, 312, 10}, {13, 264, 31}, {1, 1000, 5}};
    int failed = 0;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int threads = 1; threads <= 3; threads += 2) {
            const int64_t *shape = shapes[i];
            failed |= check(shape[0], shape[1], shape[2], 8, 64, 0, threads);
            failed |= check(shape[0], shape[1], shape[2], 8, 256, 1, threads);
            failed |= check(shape[0], shape[1], shape[2], 4, 32, 0, threads);
        }
    printf("digest %016llx\n", (unsigned long long)digest);
    return failed;
}
