// Many rows through all layers of a tower: tiles of patches through the vision tower, the tokens of
// a prompt through the decoder. What smolstack/model/vision.py and decoder.py do.
#include "smolstack.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// Patches of `tiles` tiles through all layers, in place: x (tiles, patches, hidden).
// Returns 1 when memory runs out, else 0.
int encode_tiles(const Encoder *e, int64_t tiles, int64_t patches, float *x, int threads) {
    int64_t hidden = e->hidden, width = hidden / e->heads, failed = 0;
    float *mixed = malloc((size_t)(patches * hidden * 4) * 4), *seen = mixed + patches * hidden * 3;
    if (!mixed) return 1;
    Attention attention = {
        .rows = patches, .heads = e->heads, .kv_heads = e->heads, .width = width, .keys = patches,
        .exact = e->layer->up.kind == FLOAT32,
        .kind = CACHE_FLOAT32, .key_stride = 3 * hidden, .head_stride = width,
        .query_stride = 3 * hidden, .query = mixed, .key = mixed + hidden,
        .value = mixed + 2 * hidden, .out = seen,
    };
    const Norm none = {NO_NORM, 0, NULL, NULL};
    for (int64_t tile = 0; tile < tiles && !failed; tile++, x += patches * hidden)
        for (int64_t i = 0; i < e->layers && !failed; i++) {
            const EncoderLayer *layer = e->layer + i;
            failed |= mixed_rows(&layer->attention_norm, &layer->query, &layer->key, &layer->value,
                                 x, patches, mixed, threads);
            failed |= attend_rows(&attention, threads);
            failed |= dense_rows(&layer->out, &none, seen, patches, NONE, x, x, threads);
            failed |= mlp_rows(&layer->mlp_norm, NULL, &layer->up, &layer->down, e->activation, x,
                               patches, threads);
        }
    free(mixed);
    return (int)failed;
}

// Applies RoPE to queries and keys of (rows, q + k + v), and writes keys and values to the cache.
static void place_rows(const Decoder *d, int64_t rows, const CacheSlot *slot, const float *turns,
                       float *mixed, void *keys, void *values, int threads) {
    int64_t width = d->head_dim, all = (d->heads + 2 * d->kv_heads) * width;
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        float *q = mixed + row * all, *k = q + d->heads * width, *v = k + d->kv_heads * width;
        for (int64_t h = 0; h < d->heads + d->kv_heads; h++)
            rotate(width, turns + row * width, q + h * width);
        for (int64_t h = 0; h < d->kv_heads; h++) {
            int64_t at = (h * slot->capacity + slot->past + row) * width;
            write_cache(d, keys, at, k + h * width);
            write_cache(d, values, at, v + h * width);
        }
    }
}

// Writes one sequence's new rows to its cache, then attends over the cache. Padding before the
// first token is excluded: positions are counted from the first token.
static int attend_sequence(const Decoder *d, int64_t rows, const CacheSlot *slot, const float *turns,
                           float *mixed, void *keys, void *values, float *seen, int threads) {
    int64_t width = d->head_dim, size = d->cache == CACHE_FLOAT32 ? 4 : 2;
    place_rows(d, rows, slot, turns, mixed, keys, values, threads);
    Attention attention = {
        .rows = rows, .heads = d->heads, .kv_heads = d->kv_heads, .width = width,
        .keys = slot->past + rows - slot->first, .causal = 1, .kind = d->cache,
        .exact = d->layer->up.kind == FLOAT32,
        .key_stride = width, .head_stride = slot->capacity * width,
        .query_stride = (d->heads + 2 * d->kv_heads) * width, .query = mixed,
        .key = (const char *)keys + slot->first * width * size,
        .value = (const char *)values + slot->first * width * size, .out = seen,
    };
    return attend_rows(&attention, threads);
}

// The next counts[s] tokens of every sequence through all layers, in place, into their caches: x
// (all tokens, hidden), sequence after sequence; keys, values (sequences, layers): buffers of
// (kv_heads, capacity, head_dim). The sequences share each layer's weights while they are in
// cache; none affects another's result.
// Returns 1 when memory runs out, else 0.
int prefill_rows(const Decoder *d, int64_t sequences, const int64_t *counts, const CacheSlot *slot,
                 void *const *keys, void *const *values, float *x, int threads) {
    int64_t width = d->head_dim, all = (d->heads + 2 * d->kv_heads) * width, rows = 0, failed = 0;
    for (int64_t s = 0; s < sequences; s++) rows += counts[s];
    float *mixed = malloc((size_t)(rows * (all + d->heads * width + width)) * 4);
    if (!mixed) return 1;
    float *seen = mixed + rows * all, *turns = seen + rows * d->heads * width, *turn = turns;
    for (int64_t s = 0; s < sequences; s++)
        for (int64_t row = 0; row < counts[s]; row++, turn += width)
            for (int64_t i = 0; i < width / 2; i++) {
                float angle = (float)(slot[s].past - slot[s].first + row) * d->frequencies[i];
                turn[i] = cosf(angle);
                turn[width / 2 + i] = sinf(angle);
            }
    const Norm none = {NO_NORM, 0, NULL, NULL};
    for (int64_t i = 0; i < d->layers && !failed; i++) {
        const Layer *layer = d->layer + i;
        const Norm before = {RMS_NORM, d->norm_eps, layer->attention_norm, NULL};
        const Norm between = {RMS_NORM, d->norm_eps, layer->mlp_norm, NULL};
        failed |= mixed_rows(&before, &layer->query, &layer->key, &layer->value, x, rows, mixed,
                             threads);
        for (int64_t s = 0, row = 0; s < sequences; row += counts[s++])
            failed |= attend_sequence(d, counts[s], slot + s, turns + row * width,
                                      mixed + row * all, keys[s * d->layers + i],
                                      values[s * d->layers + i], seen + row * d->heads * width,
                                      threads);
        failed |= dense_rows(&layer->out, &none, seen, rows, NONE, x, x, threads);
        failed |= mlp_rows(&between, &layer->gate, &layer->up, &layer->down, d->activation, x, rows,
                           threads);
    }
    free(mixed);
    return (int)failed;
}
