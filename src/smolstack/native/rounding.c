// Weights to integers: what smolstack/quantization/rounding.py does, faster.
#include "vector.h"

#define MOST_GROUP 4096  // channels of a group
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

// Eight bits, 128 too large.
static void round_bytes(const float *w, int64_t group, uint8_t *numbers, uint16_t *scale) {
    Floats largest = splat(0);
    for (int64_t i = 0; i < group; i += LANES) largest = max_lanes(largest, abs_lanes(load(w + i)));
    *scale = to_bfloat(largest_lane(largest) / 127);
    float step = load_bfloat(scale), inverse = step > 0 ? 1 / step : 0;
    for (int64_t i = 0; i < group; i += LANES) {
        Floats q = rounded(mul(load(w + i), splat(inverse)));
        q = max_lanes(min_lanes(q, splat(127)), splat(-127));
        store_low_bytes((int8_t *)numbers + i, to_nearest(add(q, splat(128))));
    }
}

// (out, in) weights to words of 8- or 4-bit numbers, the rows row_bytes apart, and their scales and
// (4 bits) zero points, (out, groups).
void round_weight(int64_t bits, const float *weight, const float *importance, int64_t out,
                  int64_t in, int64_t group, uint8_t *words, int64_t row_bytes, uint16_t *scale,
                  uint8_t *zeros, int threads) {
    int64_t groups = (in + group - 1) / group;
#pragma omp parallel for num_threads(threads)
    for (int64_t item = 0; item < out * groups; item++) {
        int64_t o = item / groups, begin = item % groups * group, count = least(group, in - begin);
        float w[MOST_GROUP] = {0}, counts[MOST_GROUP] = {0};
        uint8_t numbers[MOST_GROUP], *to = words + o * row_bytes + begin * bits / 8;
        memcpy(w, weight + o * in + begin, (size_t)count * 4);
        if (bits == 8) {
            round_bytes(w, group, numbers, scale + item);
            int64_t room = least(group, row_bytes - begin);
            memcpy(to, numbers, (size_t)room);
            continue;
        }
        memcpy(counts, importance + begin, (size_t)count * 4);
        round_group(w, counts, group, numbers, scale + item, zeros + item);
        for (int64_t i = count; i < group; i++) numbers[i] = 0;
        for (int64_t i = 0; i < group && begin / 2 + i / 2 < row_bytes; i += 2)
            to[i / 2] = (uint8_t)(numbers[i] | numbers[i + 1] << 4);
    }
}
