// Activation functions over many numbers.
#include "vector.h"

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
