// Attention of one new token over the cache, for one query group and a part of the positions at a
// time.
#include "vector_formats.h"
#include "vector_functions.h"

// Query heads whose sums are kept in registers at once.
#if NATIVE == 16 && !defined(__aarch64__)
#define MOST_HEADS 2
#else
#define MOST_HEADS 4
#endif
#define POSITIONS_AHEAD 24  // whose keys are prefetched

// Writes one head's (head_dim) floats at element `at` of a cache buffer.
void write_cache(const Decoder *d, void *cache, int64_t at, const float *x) {
    if (d->cache == CACHE_FLOAT32) {
        memcpy((float *)cache + at, x, (size_t)d->head_dim * 4);
        return;
    }
    for (int64_t i = 0; i < d->head_dim; i += LANES) {
        int64_t count = least(LANES, d->head_dim - i);
        uint16_t some[LANES];
        if (d->cache == CACHE_FLOAT16)
            store_halfs(some, load_some(x + i, count));
        else
            store_bfloats(some, load_some(x + i, count));
        memcpy((uint16_t *)cache + at + i, some, (size_t)count * 2);
    }
}

// Scores to weights, e^(score - largest): head = largest score, sum of the weights.
INLINE void soften(float *scores, int64_t count, float *head) {
    Floats most = splat(-INFINITY), sum = splat(0);
    int64_t padded = rounded_up(count, LANES);
    for (int64_t p = count; p < padded; p++) scores[p] = -INFINITY;
    for (int64_t p = 0; p < padded; p += LANES) most = max_lanes(most, load(scores + p));
    head[0] = largest_lane(most), most = splat(head[0]);
    for (int64_t p = 0; p < count; p += LANES) {
        store(scores + p, exp_lanes(sub(load(scores + p), most)));
        sum = add(sum, load_some(scores + p, count - p));
    }
    head[1] = sum_lanes(sum);
}

// Prefetches one position, which begins at element `at`.
INLINE void prefetch_position(int64_t kind, const void *cache, int64_t at, int64_t width) {
    int64_t size = kind == CACHE_FLOAT32 ? 4 : 2;
    for (int64_t i = 0; i < width * size; i += 64) prefetch((const char *)cache + at * size + i);
}

// Up to MOST_HEADS query heads over `count` positions of their key/value head. `whole`: 16 divides
// the width.
INLINE void some_heads(int64_t kind, int whole, int64_t width, int heads, int64_t count,
                       const float *query, const void *keys, const void *values, int64_t from,
                       float *partial) {
    float scores[MOST_HEADS][CHUNK], scale = 1.0f / sqrtf((float)width);
    for (int64_t p = 0; p < count; p++) {
        // The hardware's prefetcher stops at the end of a page, which holds 32 positions, and does
        // not know that the values are next.
        prefetch_position(kind, keys, from + (p + POSITIONS_AHEAD) * width, width);
        prefetch_position(kind, values, from + p * width, width);
        Floats total[MOST_HEADS];
        UNROLL for (int h = 0; h < heads; h++) total[h] = splat(0);
        for (int64_t i = 0; i < width; i += LANES) {
            int64_t left = whole ? LANES : width - i;
            Floats key = load_cached(kind, keys, from + p * width + i, left);
            UNROLL for (int h = 0; h < heads; h++)
                total[h] = fma_lanes(load_some(query + h * width + i, left), key, total[h]);
        }
        UNROLL for (int h = 0; h < heads; h++) scores[h][p] = sum_lanes(total[h]) * scale;
    }
    for (int h = 0; h < heads; h++) soften(scores[h], count, partial + h * (width + 2));
    for (int64_t i = 0; i < width; i += LANES) {
        int64_t left = whole ? LANES : width - i;
        Floats total[MOST_HEADS];
        UNROLL for (int h = 0; h < heads; h++) total[h] = splat(0);
        for (int64_t p = 0; p < count; p++) {
            Floats value = load_cached(kind, values, from + p * width + i, left);
            UNROLL for (int h = 0; h < heads; h++)
                total[h] = fma_lanes(splat(scores[h][p]), value, total[h]);
        }
        UNROLL for (int h = 0; h < heads; h++)
            store_some(partial + h * (width + 2) + 2 + i, total[h], left);
    }
}

// Of widths that 16 does not divide, which no published model has, one head at a time.
#define HEADS(KIND, NAME)                                                                        \
    static void NAME(int64_t width, int64_t heads, int64_t count, const float *query,            \
                     const void *keys, const void *values, int64_t from, float *partial) {       \
        int shape = width % LANES == 0 ? (int)heads : 0;                                         \
        switch (shape) {                                                                         \
        case 1: some_heads(KIND, 1, width, 1, count, query, keys, values, from, partial); break; \
        case 2: some_heads(KIND, 1, width, 2, count, query, keys, values, from, partial); break; \
        THREE_OR_FOUR(KIND)                                                                      \
        default:                                                                                 \
            for (int64_t h = 0; h < heads; h++, query += width, partial += width + 2)            \
                some_heads(KIND, 0, width, 1, count, query, keys, values, from, partial);        \
        }                                                                                        \
    }
#if MOST_HEADS == 4
#define THREE_OR_FOUR(KIND)                                                                      \
        case 3: some_heads(KIND, 1, width, 3, count, query, keys, values, from, partial); break; \
        case 4: some_heads(KIND, 1, width, 4, count, query, keys, values, from, partial); break;
#else
#define THREE_OR_FOUR(KIND)
#endif
HEADS(CACHE_FLOAT32, over_floats)
HEADS(CACHE_FLOAT16, over_halves)
HEADS(CACHE_BFLOAT16, over_bfloats)

// The query heads of one key/value head over `count` positions, whose keys and values begin at
// element `from`. Per head: the largest score, the sum of the weights, the weighted values.
void attend(const Decoder *d, int64_t count, int64_t from, const float *query, const void *keys,
            const void *values, float *partial) {
    int64_t group = d->heads / d->kv_heads, width = d->head_dim;
    for (int64_t h = 0; h < group; h += MOST_HEADS) {
        const float *q = query + h * width;
        float *out = partial + h * (width + 2);
        int64_t some = least(MOST_HEADS, group - h);
        if (d->cache == CACHE_FLOAT16)
            over_halves(width, some, count, q, keys, values, from, out);
        else if (d->cache == CACHE_BFLOAT16)
            over_bfloats(width, some, count, q, keys, values, from, out);
        else
            over_floats(width, some, count, q, keys, values, from, out);
    }
}

// Combines the parts of one query head, `apart` floats from each other, into one softmax.
void join(int64_t width, int64_t parts, const float *partial, int64_t apart, float *out) {
    float most = partial[0], sum = 0;
    for (int64_t i = 1; i < parts; i++) most = fmaxf(most, partial[i * apart]);
    memset(out, 0, (size_t)width * 4);
    for (int64_t i = 0; i < parts; i++) {
        const float *part = partial + i * apart;
        float weight = first_lane(exp_lanes(splat(part[0] - most)));
        sum += part[1] * weight;
        for (int64_t j = 0; j < width; j++) out[j] += part[2 + j] * weight;
    }
    for (int64_t j = 0; j < width; j++) out[j] /= sum;
}

// Rotates the channel pairs (i, i + width/2); `turns` contains width/2 cosines, then as many sines.
void rotate(int64_t width, const float *turns, float *x) {
    for (int64_t i = 0, half = width / 2; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = first * turns[i] - second * turns[half + i];
        x[i + half] = second * turns[i] + first * turns[half + i];
    }
}
