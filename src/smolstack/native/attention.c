// Attention of one new token over the cache, for one query group and a part of the positions at a
// time.
#include "smolstack.h"

#include "simd.h"

INLINE Float8 load_cached(int64_t kind, const void *from, int64_t at) {
    if (kind == CACHE_FLOAT16) return load8_half((const uint16_t *)from + at);
    if (kind == CACHE_BFLOAT16) return load8_bfloat((const uint16_t *)from + at);
    return load8((const float *)from + at);
}

// Writes one head's (head_dim) floats at element `at` of a cache buffer.
void write_cache(const Decoder *d, void *cache, int64_t at, const float *x) {
    for (int64_t i = 0; i < d->head_dim; i += 8) {
        if (d->cache == CACHE_FLOAT16)
            store8_half((uint16_t *)cache + at + i, load8(x + i));
        else if (d->cache == CACHE_BFLOAT16)
            store8_bfloat((uint16_t *)cache + at + i, load8(x + i));
        else
            store8((float *)cache + at + i, load8(x + i));
    }
}

// Up to four query heads over the positions first .. end of their key/value head.
INLINE void some_heads(int64_t kind, int64_t width, int heads, int64_t count, const float *query,
                       const void *keys, const void *values, int64_t from, float *partial) {
    float scores[4][CHUNK], scale = 1.0f / sqrtf((float)width);
    for (int64_t p = 0; p < count; p++) {
        Float8 total[4];
        UNROLL for (int h = 0; h < heads; h++) total[h] = zero8();
        for (int64_t i = 0; i < width; i += 8) {
            Float8 key = load_cached(kind, keys, from + p * width + i);
            UNROLL for (int h = 0; h < heads; h++)
                total[h] = fma8(load8(query + h * width + i), key, total[h]);
        }
        UNROLL for (int h = 0; h < heads; h++) scores[h][p] = sum8(total[h]) * scale;
    }
    for (int h = 0; h < heads; h++) {
        float *out = partial + h * (width + 2), most = -INFINITY, sum = 0;
        for (int64_t p = 0; p < count; p++) most = scores[h][p] > most ? scores[h][p] : most;
        for (int64_t p = 0; p < count; p++) scores[h][p] = fast_exp(scores[h][p] - most);
        for (int64_t p = 0; p < count; p++) sum += scores[h][p];
        out[0] = most, out[1] = sum;
    }
    for (int64_t i = 0; i < width; i += 8) {
        Float8 total[4];
        UNROLL for (int h = 0; h < heads; h++) total[h] = zero8();
        for (int64_t p = 0; p < count; p++) {
            Float8 value = load_cached(kind, values, from + p * width + i);
            UNROLL for (int h = 0; h < heads; h++)
                total[h] = fma8(splat8(scores[h][p]), value, total[h]);
        }
        UNROLL for (int h = 0; h < heads; h++)
            store8(partial + h * (width + 2) + 2 + i, total[h]);
    }
}

#define HEADS(KIND, NAME)                                                                       \
    static void NAME(int64_t width, int64_t heads, int64_t count, const float *query,           \
                     const void *keys, const void *values, int64_t from, float *partial) {      \
        switch (heads) {                                                                        \
        case 1: some_heads(KIND, width, 1, count, query, keys, values, from, partial); break;   \
        case 2: some_heads(KIND, width, 2, count, query, keys, values, from, partial); break;   \
        case 3: some_heads(KIND, width, 3, count, query, keys, values, from, partial); break;   \
        default: some_heads(KIND, width, 4, count, query, keys, values, from, partial); break;  \
        }                                                                                       \
    }
HEADS(CACHE_FLOAT32, over_floats)
HEADS(CACHE_FLOAT16, over_halves)
HEADS(CACHE_BFLOAT16, over_bfloats)

// The query heads of one key/value head over `count` positions, whose keys and values begin at
// element `from`. Per head: the largest score, the sum of the weights, the weighted values.
void attend(const Decoder *d, int64_t count, int64_t from, const float *query, const void *keys,
            const void *values, float *partial) {
    int64_t group = d->heads / d->kv_heads, width = d->head_dim;
    for (int64_t h = 0; h < group; h += 4) {
        const float *q = query + h * width;
        float *out = partial + h * (width + 2);
        int64_t some = least(4, group - h);
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
        float weight = fast_exp(part[0] - most);
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
