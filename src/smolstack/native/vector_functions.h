// The exponential, and activation functions.
#ifndef SMOLSTACK_VECTOR_FUNCTIONS_H
#define SMOLSTACK_VECTOR_FUNCTIONS_H

#include "vector.h"

// p · 2^n for whole n from -126 to 127.
INLINE Floats times_two_to(Floats p, Floats n) {
#if defined(VECTOR_512)
    Floats out = {{(vf)_mm512_scalef_ps((__m512)p.part[0], (__m512)n.part[0])}};
    return out;
#else
    Ints whole = to_nearest(n);
    EACH whole.part[k] = (whole.part[k] + 127) << 23;
    return mul(p, from_bits(whole));
#endif
}

// e^x to about one part in 10⁷ (Cephes' polynomial).
INLINE Floats exp_lanes(Floats x) {
    x = max_lanes(min_lanes(x, splat(88.0f)), splat(-87.0f));
    Floats n = rounded(mul(x, splat(1.44269504f)));
    Floats r = fma_lanes(n, splat(-0.693359375f), x);
    r = fma_lanes(n, splat(2.12194440e-4f), r);
    Floats p = splat(1.9875691500e-4f);
    p = fma_lanes(p, r, splat(1.3981999507e-3f));
    p = fma_lanes(p, r, splat(8.3334519073e-3f));
    p = fma_lanes(p, r, splat(4.1665795894e-2f));
    p = fma_lanes(p, r, splat(1.6666665459e-1f));
    p = fma_lanes(p, r, splat(5.0000001201e-1f));
    p = fma_lanes(p, mul(r, r), add(r, splat(1.0f)));
    return times_two_to(p, n);
}

// 2^x for x up to 0 to about 6e-06 (a least-squares polynomial): finer than the bfloat16 that
// becomes of it.
INLINE Floats power_of_two(Floats x) {
    x = max_lanes(x, splat(-126.0f));
    Floats n = rounded(x), r = sub(x, n), p = splat(0.009590241f);
    p = fma_lanes(p, r, splat(0.055870273f));
    p = fma_lanes(p, r, splat(0.240236776f));
    p = fma_lanes(p, r, splat(0.693128048f));
    return times_two_to(fma_lanes(p, r, splat(1.0f)), n);
}

INLINE Floats activate_lanes(int64_t activation, Floats x) {
    const Floats one = splat(1.0f);
    if (activation == RELU) return max_lanes(x, splat(0.0f));
    if (activation == SILU) return divide(x, add(one, exp_lanes(sub(splat(0.0f), x))));
    if (activation == GELU_TANH) {  // x (1 + tanh u) / 2 = x / (1 + e^(-2u))
        Floats cube = mul(mul(x, x), x), u = fma_lanes(splat(0.044715f), cube, x);
        return divide(x, add(one, exp_lanes(mul(u, splat(-2.0f * 0.79788456f)))));
    }
    if (activation == GELU) {
        float some[LANES];
        store(some, x);
        for (int i = 0; i < LANES; i++) some[i] *= 0.5f * (1.0f + erff(some[i] * 0.70710678f));
        return load(some);
    }
    return x;
}

#endif
