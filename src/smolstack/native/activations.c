// Activation functions over many numbers, and what the kernels were compiled for.
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

// 0 plain C, 1 AVX2, 2 AVX2 with VNNI, 3 AVX-512 with VNNI, 4 that with bfloat16 products, 5 NEON,
// 6 NEON with products of bytes.
int instructions(void) {
#if defined(VECTOR_512) && defined(__AVX512BF16__)
    return 4;
#elif defined(VECTOR_512)
    return 3;
#elif defined(SIMD_VNNI)
    return 2;
#elif defined(VECTOR_256)
    return 1;
#elif defined(__ARM_FEATURE_DOTPROD)
    return 6;
#elif defined(__aarch64__)
    return 5;
#else
    return 0;
#endif
}
