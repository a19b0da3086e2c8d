// Weights to 4 bits: what smolstack/quantization/rounding.py does, faster.
#include "vector.h"

#define LEVELS 15.0f

static const float SHARES[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f};

static float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

static uint16_t to_bfloat(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The scale and zero point of a group that leave the least squared error weighed by `importance`.
static void round_group(const float *w, const float *importance, int64_t group, uint8_t *numbers,
                        uint16_t *scale, uint8_t *zero) {
    Floats smallest = splat(0), largest = splat(0);
    for (int64_t i = 0; i < group; i += LANES) {
        smallest = max_lanes(smallest, sub(splat(0), load(w + i)));
        largest = max_lanes(largest, load(w + i));
    }
    float low = -largest_lane(smallest), high = largest_lane(largest), best = INFINITY;
    float best_inverse = 0, best_zero = 0;
    *scale = 0;
    for (size_t c = 0; c < sizeof SHARES / sizeof *SHARES; c++) {
        uint16_t tried = to_bfloat((high - low) * (SHARES[c] / LEVELS));
        float step = load_bfloat(&tried), inverse = step > 0 ? 1 / step : 0;
        float middle = rintf(-low * SHARES[c] * inverse);
        for (int offset = -1; offset <= 1; offset++) {
            float z = clamped(middle + (float)offset, 0, LEVELS);
            Floats error = splat(0);
            for (int64_t i = 0; i < group; i += LANES) {
                Floats x = load(w + i), q = add(rounded(mul(x, splat(inverse))), splat(z));
                q = max_lanes(min_lanes(q, splat(LEVELS)), splat(0));
                Floats off = sub(mul(sub(q, splat(z)), splat(step)), x);
                error = fma_lanes(mul(off, off), load(importance + i), error);
            }
            float total = sum_lanes(error);
            if (total < best)
                best = total, best_inverse = inverse, best_zero = z, *scale = tried;
        }
    }
    for (int64_t i = 0; i < group; i++)
        numbers[i] = (uint8_t)clamped(rintf(w[i] * best_inverse) + best_zero, 0, LEVELS);
    *zero = (uint8_t)best_zero;
}

// (out, in) weights, whole groups a row, to integers from 0 to 15, scales and zero points (out, groups).
void round_nibbles(const float *weight, const float *importance, int64_t out, int64_t in,
                   int64_t group, uint8_t *numbers, uint16_t *scale, uint8_t *zeros, int threads) {
    int64_t groups = in / group;
#pragma omp parallel for num_threads(threads)
    for (int64_t o = 0; o < out; o++)
        for (int64_t g = 0; g < groups; g++)
            round_group(weight + o * in + g * group, importance + g * group, group,
                        numbers + o * in + g * group, scale + o * groups + g, zeros + o * groups + g);
}
