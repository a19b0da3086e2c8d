// Activations on their way into a linear layer: quantised per row (per token), to
// rint(x · 127 / max|x|), in the width that the processor multiplies.
#include "smolstack.h"

#include "simd.h"

#if defined(SIMD_VNNI)
typedef uint8_t Number;  // x + 128: VNNI multiplies unsigned by signed bytes
#define ZERO 128
#else
typedef int16_t Number;
#define ZERO 0
#endif

int64_t rows_bytes(int64_t rows, int64_t in) {
    int64_t stride = rounded_up(in, 64);
    return rows * (stride * 2 + stride / GROUP * 32 + 64) + 256;
}

// Places for `rows` rows in `memory` of rows_bytes(rows, in).
void lay_out_rows(Rows *to, void *memory, int64_t rows, int64_t in) {
    char *at = (char *)rounded_up((int64_t)(intptr_t)memory, 64);
    to->rows = rows, to->in = in, to->stride = rounded_up(in, 64);
    to->scale = (float *)at;
    at += rounded_up(rows * 4, 64);
    to->numbers = at;
    at += rounded_up(rows * to->stride * 2, 64);
    to->offsets = (int32_t *)at;
}

static float largest(const float *x, int64_t count) {
    float most[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int j = 0; j < 8; j++) {
            float magnitude = fabsf(x[i + j]);
            most[j] = magnitude > most[j] ? magnitude : most[j];
        }
    for (; i < count; i++) most[0] = fabsf(x[i]) > most[0] ? fabsf(x[i]) : most[0];
    for (int j = 1; j < 8; j++) most[0] = most[j] > most[0] ? most[j] : most[0];
    return most[0];
}

// A sum of four neighbours stands in the lane that multiplies them (see int4 in linear.c).
static void zero_points(const int8_t *q, int64_t count, int32_t *offsets) {
    for (int64_t i = 0; i < count / 4; i++)
        offsets[i] = -8 * (q[4 * i] + q[4 * i + 1] + q[4 * i + 2] + q[4 * i + 3]);
}

// Quantise rows of x, `stride` floats apart, for weights of `kind`.
void prepare_rows(Rows *to, int64_t kind, const float *x, int64_t stride) {
    to->kind = kind;
    if (kind == FLOAT32 || kind == BFLOAT16) {
        to->floats = x, to->stride = stride;
        return;
    }
    to->stride = rounded_up(to->in, 64);
    for (int64_t row = 0; row < to->rows; row++, x += stride) {
        float most = largest(x, to->in);
        float inverse = most > 0 ? 127.0f / most : 0;
        to->scale[row] = most / 127.0f;
        if (kind == INT8) {
            Number *q = (Number *)to->numbers + row * to->stride;
            for (int64_t i = 0; i < to->in; i++) q[i] = (Number)((int32_t)rintf(x[i] * inverse) + ZERO);
        } else {
            int8_t *q = (int8_t *)to->numbers + row * to->stride;
            for (int64_t i = 0; i < to->in; i++) q[i] = (int8_t)rintf(x[i] * inverse);
            zero_points(q, to->in, to->offsets + row * (to->in / GROUP) * 8);
        }
    }
}

void activate(int64_t activation, float *x, int64_t count) {
    switch (activation) {
    case RELU:
        for (int64_t i = 0; i < count; i++) x[i] = x[i] > 0 ? x[i] : 0;
        break;
    case SILU:
        for (int64_t i = 0; i < count; i++) x[i] = x[i] / (1.0f + fast_exp(-x[i]));
        break;
    case GELU:
        for (int64_t i = 0; i < count; i++) x[i] *= 0.5f * (1.0f + erff(x[i] * 0.70710678f));
        break;
    case GELU_TANH:  // x (1 + tanh u) / 2 = x / (1 + e^(-2u))
        for (int64_t i = 0; i < count; i++) {
            float u = 0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
            x[i] = x[i] / (1.0f + fast_exp(-2.0f * u));
        }
        break;
    default:
        break;
    }
}

// (rows, in) floats → int8 and one scale per row; weights are quantised by it.
void quantise_int8(const float *x, int64_t rows, int64_t in, int8_t *q, float *scale) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * in;
        float most = largest(from, in), inverse = most > 0 ? 127.0f / most : 0;
        scale[row] = most / 127.0f;
        for (int64_t i = 0; i < in; i++) q[row * in + i] = (int8_t)rintf(from[i] * inverse);
    }
}

void sum_rows(const int8_t *weight, int64_t rows, int64_t in, int32_t *sums) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        int32_t sum = 0;
        for (int64_t i = 0; i < in; i++) sum += weight[row * in + i];
        sums[row] = sum;
    }
}

// What the kernels were compiled for: 0 plain C, 1 AVX2, 2 VNNI.
int instructions(void) {
#if defined(SIMD_VNNI)
    return 2;
#elif defined(SIMD_AVX2)
    return 1;
#else
    return 0;
#endif
}
