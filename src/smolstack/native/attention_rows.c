// Attention of many queries over many keys. Products are in float32, or in bfloat16 pairs where the
// processor has instructions for them and the caller does not request float32. Softmax is in float32.
#include "product.h"

#include "vector_functions.h"

#include <stdlib.h>

#define QUERY_ROWS 64   // queries per work item
#define QUERIES 8       // queries scored at once
#define LOG2_E 1.44269504f

static int in_pairs(const Attention *a) { return PAIR_PRODUCTS && !a->exact; }

// Bytes of a number in a product.
static int64_t size_of(const Attention *a) { return in_pairs(a) ? 2 : 4; }

// One head's keys as panels of 16 keys, a step being one channel, or two.
static void pack_keys(const Attention *a, int64_t from, uint32_t *to) {
    int pairs = in_pairs(a);
    int64_t steps = pairs ? (a->width + 1) / 2 : a->width, padded = rounded_up(a->keys, LANES);
    for (int64_t j = 0; j < padded; j++) {
        uint32_t numbers[MOST_WIDTH], *panel = to + j / LANES * steps * LANES + j % LANES;
        for (int64_t i = 0; i < a->width; i += LANES) {
            Floats some = splat(0);
            if (j < a->keys) some = load_cached(a->kind, a->key, from + j * a->key_stride + i, a->width - i);
            if (pairs)
                store_bfloats((uint16_t *)numbers + i, some);
            else
                store_bytes(numbers + i, bits_of(some));
        }
        for (int64_t s = 0; s < steps; s++) panel[s * LANES] = numbers[s];
    }
}

// One head's values as panels of 16 channels, a step being one key, or two.
static void pack_values(const Attention *a, int64_t from, uint32_t *to) {
    int64_t padded = rounded_up(a->keys, LANES), each = in_pairs(a) ? 2 : 1;
    for (int64_t i = 0; i < a->width; i += LANES)
        for (int64_t j = 0; j < padded; j += each, to += LANES) {
            Floats some[2];
            for (int64_t k = 0; k < each; k++) {
                int64_t at = from + (j + k) * a->key_stride + i;
                some[k] = j + k < a->keys ? load_cached(a->kind, a->value, at, a->width - i) : splat(0);
            }
            if (each == 1)
                store((float *)to, some[0]);
            else {
                uint16_t two[2][LANES], *pairs = (uint16_t *)to;
                store_bfloats(two[0], some[0]), store_bfloats(two[1], some[1]);
                for (int64_t l = 0; l < LANES; l++)
                    pairs[2 * l] = two[0][l], pairs[2 * l + 1] = two[1][l];
            }
        }
}

// Eight rows of numbers times panels.
static void multiply_eight(const Attention *a, const void *x, int64_t stride, const char *panels,
                           int64_t apart, int64_t numbers, int64_t count, float *out, int64_t wide) {
#if PAIR_PRODUCTS
    if (in_pairs(a)) {
        multiply_pairs(x, stride * 2, panels, (apart + 1) / 2 * 64, (numbers + 1) / 2, QUERIES, count,
                       out, wide);
        return;
    }
#endif
    (void)a;
    multiply_singles(x, stride, (const float *)panels, apart * LANES, numbers, QUERIES, count, out,
                     wide);
}

// The first `end` scores of a row to weights, as numbers of a product up to `padded`; one over their
// sum.
static float soften(int pairs, float *scores, int64_t end, int64_t padded, char *to) {
    Floats most = splat(-INFINITY), sum = splat(0);
    for (int64_t i = end; i < padded; i++) scores[i] = -INFINITY;
    for (int64_t i = 0; i < padded; i += LANES) most = max_lanes(most, load(scores + i));
    most = splat(largest_lane(most));
    for (int64_t i = 0; i < padded; i += LANES) {
        Floats below = sub(load(scores + i), most), power = power_of_two(below);
        // Positions after the end, and scores too small to matter, get weight 0.
        EACH power.part[k] = (vf)((vi)power.part[k] & (below.part[k] > -126.0f));
        sum = add(sum, power);
        if (pairs)
            store_bfloats((uint16_t *)to + i, power);
        else
            store((float *)to + i, power);
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
    return rounded_up(QUERIES * (width * 8 + keys * 8), 64) + 64;
}

static Scratch scratch_at(const Attention *a, char *at) {
    int64_t keys = rounded_up(a->keys, LANES), width = rounded_up(a->width, LANES);
    Scratch s;
    s.scores = (float *)at, at += QUERIES * keys * 4;
    s.mixed = (float *)at, at += QUERIES * width * 4;
    s.weights = at, at += QUERIES * keys * 4;
    s.query = at;
    return s;
}

// Eight queries of one head from row `row` on.
static void eight_queries(const Attention *a, int64_t head, int64_t row, const char *keys,
                          const char *values, const Scratch *s) {
    int64_t width = rounded_up(a->width, LANES), padded = rounded_up(a->keys, LANES);
    int64_t count = least(QUERIES, a->rows - row), past = a->keys - a->rows;
    int64_t seen = a->causal ? past + row + count : a->keys, reach = rounded_up(seen, LANES);
    int64_t size = size_of(a);
    int pairs = in_pairs(a);
    Floats scale = splat(LOG2_E / sqrtf((float)a->width));  // scores are powers of two
    for (int64_t r = 0; r < count; r++) {
        const float *from = a->query + (row + r) * a->query_stride + head * a->width;
        for (int64_t i = 0; i < width; i += 16) {
            Floats some = load_some(from + i, a->width - i);
            if (pairs)
                store_bfloats((uint16_t *)s->query + r * width + i, mul(some, scale));
            else
                store((float *)s->query + r * width + i, mul(some, scale));
        }
    }
    multiply_eight(a, s->query, width, keys, a->width, a->width, reach / LANES, s->scores, padded);
    float inverse[QUERIES];
    for (int64_t r = 0; r < count; r++) {
        int64_t end = a->causal ? past + row + r + 1 : a->keys;
        inverse[r] = soften(pairs, s->scores + r * padded, end, reach,
                            s->weights + r * padded * size);
    }
    multiply_eight(a, s->weights, padded, values, padded, reach, width / LANES, s->mixed, width);
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
    int64_t key_bytes = padded * rounded_up(a->width, 2) * size_of(a);
    int64_t value_bytes = padded * rounded_up(a->width, LANES) * size_of(a);
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

