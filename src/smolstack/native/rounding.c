// Rounds weights to integers: a faster version of smolstack/quantization/rounding.py.
#include "vector_formats.h"

#include <stdlib.h>

#define PANEL LANES      // output channels of a panel (panels.c)
#define LEVELS 15.0f

static const float SHARES[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f};

static uint16_t to_bfloat(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// x rounded to bfloat16.
INLINE Floats as_bfloats(Floats x, uint16_t *bits) {
    store_bfloats(bits, x);
    return load_bfloats(bits);
}

// The squared error of a group, weighed by importance, when x becomes (clamp(steps) - zero) ·
// scale.
INLINE Floats error_of(const Floats *x, const float *importance, int64_t group, const Floats *steps,
                       Floats scale, Floats zero) {
    Floats error = splat(0), low = sub(splat(0), zero), high = sub(splat(LEVELS), zero);
    for (int64_t i = 0; i < group; i++) {
        Floats off = sub(mul(max_lanes(min_lanes(steps[i], high), low), scale), x[i]);
        error = fma_lanes(mul(off, off), splat(importance[i]), error);
    }
    return error;
}

// Finds the scales and zero points with the least squared error weighted by `importance`, for one
// group of 16 outputs: x[i] holds input channel i of all outputs, one per lane.
static void round_group(const Floats *x, const float *importance, int64_t group, Floats *steps,
                        uint8_t *numbers, uint16_t *scale, uint8_t *zero) {
    Floats low = splat(0), high = splat(0), best = splat(INFINITY), best_scale = splat(0);
    Floats best_zero = splat(0), one = splat(1);
    for (int64_t i = 0; i < group; i++) low = min_lanes(low, x[i]), high = max_lanes(high, x[i]);
    for (size_t c = 0; c < sizeof SHARES / sizeof *SHARES; c++) {
        uint16_t bits[LANES];
        Floats tried = as_bfloats(mul(sub(high, low), splat(SHARES[c] / LEVELS)), bits);
        Floats inverse = where_less(splat(0), tried, divide(one, tried), splat(0));
        Floats middle = rounded(mul(mul(sub(splat(0), low), splat(SHARES[c])), inverse));
        for (int64_t i = 0; i < group; i++) steps[i] = rounded(mul(x[i], inverse));
        for (int offset = -1; offset <= 1; offset++) {
            Floats z = max_lanes(min_lanes(add(middle, splat((float)offset)), splat(LEVELS)), splat(0));
            Floats error = error_of(x, importance, group, steps, tried, z);
            best_scale = where_less(error, best, tried, best_scale);
            best_zero = where_less(error, best, z, best_zero);
            best = min_lanes(error, best);
        }
    }
    Floats inverse = where_less(splat(0), best_scale, divide(one, best_scale), splat(0));
    uint8_t lanes[LANES];
    store_low_bytes((int8_t *)lanes, to_nearest(best_zero));
    memcpy(zero, lanes, LANES);
    as_bfloats(best_scale, scale);
    for (int64_t i = 0; i < group; i++) {
        Floats q = add(rounded(mul(x[i], inverse)), best_zero);
        q = max_lanes(min_lanes(q, splat(LEVELS)), splat(0));
        store_low_bytes((int8_t *)lanes, to_nearest(q));
        for (int lane = 0; lane < LANES; lane++) numbers[lane * group + i] = lanes[lane];
    }
}

// Eight bits, with 128 added.
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

// Buffers of round_panel, for groups of up to `group` channels.
static int64_t room_of(int64_t group) { return group * (PANEL + PANEL * 4 + 4 + 2 * 64); }

// Rounds a group of sixteen outputs: numbers (16, group), scales and zero points. Missing outputs
// are 0.
static void round_panel(int64_t bits, const Stored *s, const float *importance, int64_t group,
                        int64_t panel, int64_t g, char *room, uint8_t *numbers, uint16_t *scale,
                        uint8_t *zero) {
    int64_t begin = g * group, count = least(group, s->in - begin);
    int64_t there = least(PANEL, s->out - panel * PANEL);
    Floats *x = (Floats *)room, *steps = x + group;
    float *w = (float *)(steps + group), *counts = w + PANEL * group;
    memset(w, 0, (size_t)(PANEL * group) * 4);
    for (int64_t lane = 0; lane < there; lane++)
        stored_row(s, panel * PANEL + lane, begin, count, w + lane * group);
    if (bits == 8) {
        for (int64_t lane = 0; lane < PANEL; lane++)
            round_bytes(w + lane * group, group, numbers + lane * group, scale + lane);
        return;
    }
    for (int64_t i = 0; i < group; i++) {
        float across[LANES];
        for (int lane = 0; lane < PANEL; lane++) across[lane] = w[lane * group + i];
        x[i] = load(across);
        counts[i] = i < count ? importance[begin + i] : 0;
    }
    round_group(x, counts, group, steps, numbers, scale, zero);
    for (int64_t i = count; i < group; i++)
        for (int64_t lane = 0; lane < PANEL; lane++) numbers[lane * group + i] = 0;
}

// Rounds a weight to 8 or 4 bits: into `panels`, followed by scales and zero points, or, if that is
// NULL, into words of 8- or 4-bit numbers, the rows row_bytes apart, and their scales and (4
// bits) zero points, (out, groups). `importance` (in) is read with 4 bits. Groups are
// multiples of 16 channels. Returns 1 when memory runs out, else 0.
int round_weight(int64_t bits, const Stored *s, const float *importance, int64_t group, void *panels,
                 uint8_t *words, int64_t row_bytes, uint16_t *scales, uint8_t *zeros, int threads) {
    int64_t groups = (s->in + group - 1) / group, tall = (s->out + PANEL - 1) / PANEL;
    int64_t room = rounded_up(room_of(group), 64);
    char *memory = malloc((size_t)(room * threads + 64));
    if (!memory) return 1;
#pragma omp parallel for num_threads(threads)
    for (int part = 0; part < threads; part++) {
        char *own_room = (char *)rounded_up((int64_t)(intptr_t)memory, 64) + part * room;
        uint8_t *numbers = (uint8_t *)own_room + group * (PANEL * 4 + 4 + 2 * 64), zero[PANEL];
        uint16_t scale[PANEL];
        for (int64_t item = tall * part / threads * groups; item < tall * (part + 1) / threads * groups;
             item++) {
            int64_t panel = item / groups, g = item % groups, begin = g * group * bits / 8;
            round_panel(bits, s, importance, group, panel, g, own_room, numbers, scale, zero);
            if (panels) {
                fill_group(bits == 8 ? INT8 : INT4, s->in, s->out, group, panels, panel, g, numbers,
                           scale, zero);
                continue;
            }
            for (int64_t lane = 0; lane < least(PANEL, s->out - panel * PANEL); lane++) {
                int64_t o = panel * PANEL + lane, count = least(group * bits / 8, row_bytes - begin);
                uint8_t *own = numbers + lane * group, *to = words + o * row_bytes + begin;
                for (int64_t i = 0; bits == 4 && i < count; i++)
                    own[i] = (uint8_t)(own[2 * i] | own[2 * i + 1] << 4);
                memcpy(to, own, (size_t)count);
                scales[o * groups + g] = scale[lane];
                if (zeros) zeros[o * groups + g] = zero[lane];
            }
        }
    }
    free(memory);
    return 0;
}
