// Attention of many queries over many keys: products of bfloat16 pairs, softmax in float.
#include "smolstack.h"

#include <stdlib.h>

#include "vector.h"

#define QUERY_ROWS 64   // queries per work item
#define QUERIES 8       // queries scored at once
#define LOG2_E 1.44269504f

// 16 numbers of a head from element `at` on, the first `count` of them; the others are 0.
INLINE Floats load_cached(int64_t kind, const void *from, int64_t at, int64_t count) {
    if (kind == CACHE_FLOAT32) return load_some((const float *)from + at, count);
    const uint16_t *half = (const uint16_t *)from + at;
    uint16_t some[LANES] = {0};
    if (count < LANES) half = memcpy(some, half, (size_t)count * 2);
    if (kind == CACHE_BFLOAT16) return load_bfloats(half);
    Floats out;
    float eight[LANES];
    store8(eight, load8_half(half));
    store8(eight + 8, load8_half(half + 8));
    out = load(eight);
    return out;
}

// One head's keys as panels of 16 keys, a step being two channels.
static void pack_keys(const Attention *a, int64_t from, uint32_t *to) {
    int64_t steps = (a->width + 1) / 2, padded = rounded_up(a->keys, LANES);
    for (int64_t j = 0; j < padded; j++) {
        uint32_t pairs[MOST_WIDTH / 2], *panel = to + j / LANES * steps * LANES + j % LANES;
        for (int64_t i = 0; i < a->width; i += LANES) {
            Floats some = splat(0);
            if (j < a->keys) some = load_cached(a->kind, a->key, from + j * a->key_stride + i, a->width - i);
            store_bfloats((uint16_t *)pairs + i, some);
        }
        for (int64_t s = 0; s < steps; s++) panel[s * LANES] = pairs[s];
    }
}

// One head's values as panels of 16 channels, a step being two keys.
static void pack_values(const Attention *a, int64_t from, uint32_t *to) {
    int64_t steps = rounded_up(a->keys, LANES) / 2;
    for (int64_t i = 0; i < a->width; i += LANES)
        for (int64_t s = 0; s < steps; s++) {
            uint16_t two[2][LANES], *pairs = (uint16_t *)(to + (i / LANES * steps + s) * LANES);
            for (int64_t k = 0; k < 2; k++) {
                int64_t at = from + (2 * s + k) * a->key_stride + i;
                int there = 2 * s + k < a->keys;
                store_bfloats(two[k], there ? load_cached(a->kind, a->value, at, a->width - i)
                                            : splat(0));
            }
            for (int64_t l = 0; l < LANES; l++) pairs[2 * l] = two[0][l], pairs[2 * l + 1] = two[1][l];
        }
}

// The first `end` scores of a row to weights, in bfloat16 up to `padded`; one over their sum.
static float soften(float *scores, int64_t end, int64_t padded, char *to) {
    Floats most = splat(-INFINITY), sum = splat(0);
    for (int64_t i = end; i < padded; i++) scores[i] = -INFINITY;
    for (int64_t i = 0; i < padded; i += LANES) most = max_lanes(most, load(scores + i));
    most = splat(largest_lane(most));
    for (int64_t i = 0; i < padded; i += LANES) {
        Floats below = sub(load(scores + i), most), power = power_of_two(below);
        // Positions after the end, and scores too small to matter, get weight 0.
        EACH power.part[k] = (vf)((vi)power.part[k] & (below.part[k] > -126.0f));
        sum = add(sum, power);
        store_bfloats((uint16_t *)to + i, power);
    }
    return 1.0f / sum_lanes(sum);
}

// Buffers of one thread: queries, scores, weights and sums of eight rows.
typedef struct {
    char *query, *weights;
    float *scores, *mixed;
} Scratch;

static int64_t scratch_bytes(const Attention *a) {
    int64_t keys = rounded_up(a->keys, LANES), width = rounded_up(a->width, LANES);
    return rounded_up(QUERIES * (width * 6 + keys * 6), 64) + 64;
}

static Scratch scratch_at(const Attention *a, char *at) {
    int64_t keys = rounded_up(a->keys, LANES), width = rounded_up(a->width, LANES);
    Scratch s;
    s.scores = (float *)at, at += QUERIES * keys * 4;
    s.mixed = (float *)at, at += QUERIES * width * 4;
    s.weights = at, at += QUERIES * keys * 2;
    s.query = at;
    return s;
}

// Eight queries of one head from row `row` on.
static void eight_queries(const Attention *a, int64_t head, int64_t row, const char *keys,
                          const char *values, const Scratch *s) {
    int64_t width = rounded_up(a->width, LANES), padded = rounded_up(a->keys, LANES);
    int64_t count = least(QUERIES, a->rows - row), past = a->keys - a->rows;
    int64_t seen = a->causal ? past + row + count : a->keys, reach = rounded_up(seen, LANES);
    int64_t steps = (a->width + 1) / 2, apart = steps * 64;
    Floats scale = splat(LOG2_E / sqrtf((float)a->width));  // scores are powers of two
    for (int64_t r = 0; r < count; r++) {
        const float *from = a->query + (row + r) * a->query_stride + head * a->width;
        for (int64_t i = 0; i < width; i += 16) {
            Floats some = load_some(from + i, a->width - i);
            store_bfloats((uint16_t *)s->query + r * width + i, mul(some, scale));
        }
    }
    multiply_pairs(s->query, width * 2, keys, apart, steps, QUERIES, reach / LANES, s->scores,
                   padded);
    float inverse[QUERIES];
    for (int64_t r = 0; r < count; r++) {
        int64_t end = a->causal ? past + row + r + 1 : a->keys;
        inverse[r] = soften(s->scores + r * padded, end, reach, s->weights + r * padded * 2);
    }
    apart = padded / 2 * 64;
    multiply_pairs(s->weights, padded * 2, values, apart, reach / 2, QUERIES, width / LANES, s->mixed,
                   width);
    for (int64_t r = 0; r < count; r++) {
        float *to = a->out + ((row + r) * a->heads + head) * a->width;
        for (int64_t i = 0; i < a->width; i += 16) {
            Floats some = mul(load(s->mixed + r * width + i), splat(inverse[r]));
            store_some(to + i, some, a->width - i);
        }
    }
}

// All heads of one sequence. Returns 1 when memory runs out, else 0.
int attend_rows(const Attention *a, int threads) {
    int64_t padded = rounded_up(a->keys, LANES), group = a->heads / a->kv_heads;
    int64_t key_bytes = padded * (a->width + 1) / 2 * 4;
    int64_t value_bytes = padded * rounded_up(a->width, LANES) * 2;
    int64_t of_head = rounded_up(key_bytes + value_bytes, 64), own = scratch_bytes(a);
    int64_t blocks = (a->rows + QUERY_ROWS - 1) / QUERY_ROWS;
    char *memory = malloc((size_t)(a->kv_heads * of_head + own * threads + 64)), *packed;
    if (!memory) return 1;
    packed = (char *)rounded_up((int64_t)(intptr_t)memory, 64);
    memset(packed + a->kv_heads * of_head, 0, (size_t)(own * threads));
#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#if defined(_OPENMP)
        thread = omp_get_thread_num();
#endif
        Scratch scratch = scratch_at(a, packed + a->kv_heads * of_head + own * thread);
#pragma omp for schedule(dynamic, 1)
        for (int64_t head = 0; head < a->kv_heads; head++) {
            char *at = packed + head * of_head;
            pack_keys(a, head * a->head_stride, (uint32_t *)at);
            pack_values(a, head * a->head_stride, (uint32_t *)(at + key_bytes));
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < a->heads * blocks; item++) {
            // The longest rows of a causal head first, for load balance.
            int64_t head = item % a->heads, block = blocks - 1 - item / a->heads;
            const char *at = packed + head / group * of_head;
            int64_t end = least((block + 1) * QUERY_ROWS, a->rows);
            for (int64_t row = block * QUERY_ROWS; row < end; row += QUERIES)
                eight_queries(a, head, row, at, at + key_bytes, &scratch);
        }
    }
    free(memory);
    return 0;
}

