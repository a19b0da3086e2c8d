// Weights to integers: what smolstack/quantization/rounding.py does, faster.
#include "vector.h"

#include <stdlib.h>

#define MOST_GROUP 4096  // channels of a group
#define PANEL LANES      // output channels of a panel (panels.c)
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

// Sixteen outputs of a group: numbers (16, group), scales and zero points. Outputs that are not
// there are 0.
static void round_panel(int64_t bits, const Stored *s, const float *importance, int64_t group,
                        int64_t panel, int64_t g, uint8_t *numbers, uint16_t *scale, uint8_t *zero) {
    int64_t begin = g * group, count = least(group, s->in - begin);
    float w[MOST_GROUP], counts[MOST_GROUP] = {0};
    if (bits == 4) memcpy(counts, importance + begin, (size_t)count * 4);
    for (int64_t i = count; i < group; i++) w[i] = 0;
    for (int lane = 0; lane < PANEL; lane++) {
        uint8_t *own = numbers + lane * group;
        if (panel * PANEL + lane >= s->out) {
            memset(own, bits == 8 ? 128 : 0, (size_t)group);
            scale[lane] = 0, zero[lane] = 0;
            continue;
        }
        stored_row(s, panel * PANEL + lane, begin, count, w);
        if (bits == 8)
            round_bytes(w, group, own, scale + lane);
        else {
            round_group(w, counts, group, own, scale + lane, zero + lane);
            for (int64_t i = count; i < group; i++) own[i] = 0;
        }
    }
}

// A weight to 8 or 4 bits: into `panels`, laid out with scales and zero points behind them, or, where
// that is NULL, to words of 8- or 4-bit numbers, the rows row_bytes apart, and their scales and (4
// bits) zero points, (out, groups). `importance` (in) is read with 4 bits. Groups have at most 4,096
// channels, a multiple of 16. Returns 1 when memory runs out, else 0.
int round_weight(int64_t bits, const Stored *s, const float *importance, int64_t group, void *panels,
                 uint8_t *words, int64_t row_bytes, uint16_t *scales, uint8_t *zeros, int threads) {
    int64_t groups = (s->in + group - 1) / group, tall = (s->out + PANEL - 1) / PANEL;
    uint8_t *memory = malloc((size_t)(group * PANEL * threads));
    if (!memory) return 1;
#pragma omp parallel for num_threads(threads)
    for (int part = 0; part < threads; part++) {
        uint8_t *numbers = memory + part * group * PANEL, zero[PANEL];
        uint16_t scale[PANEL];
        for (int64_t item = tall * part / threads * groups; item < tall * (part + 1) / threads * groups;
             item++) {
            int64_t panel = item / groups, g = item % groups, begin = g * group * bits / 8;
            round_panel(bits, s, importance, group, panel, g, numbers, scale, zero);
            if (panels) {
                fill_group(bits == 8 ? INT8 : INT4, s->in, s->out, group, panels, panel, g, numbers,
                           scale, zero);
                continue;
            }
            for (int64_t lane = 0; lane < least(PANEL, s->out - panel * PANEL); lane++) {
                int64_t o = panel * PANEL + lane, room = least(group * bits / 8, row_bytes - begin);
                uint8_t *own = numbers + lane * group, *to = words + o * row_bytes + begin;
                for (int64_t i = 0; bits == 4 && i < room; i++)
                    own[i] = (uint8_t)(own[2 * i] | own[2 * i + 1] << 4);
                memcpy(to, own, (size_t)room);
                scales[o * groups + g] = scale[lane];
                if (zeros) zeros[o * groups + g] = zero[lane];
            }
        }
    }
    free(memory);
    return 0;
}
