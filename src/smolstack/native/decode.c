// Decodes one new token per sequence through the whole decoder, as smolstack/model/decoder.py does,
// in one parallel region.
//
// Threads divide the output channels of each linear layer and the positions of attention. Cheap
// work (norms, quantization, RoPE of the queries) is repeated in every thread, so a layer needs
// only five barriers. A sequence's result depends neither on the threads nor on the other
// sequences.
#include "smolstack.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// The state of one call of decode_step.
typedef struct {
    const Decoder *d;
    int64_t rows, parts, threads;
    const CacheSlot *slot;
    void *const *keys, *const *values;  // (rows, layers)
    // Shared by the threads: states, q k v of all rows, partial attention, the gated MLP.
    float *x, *mixed, *partial, *inner, *turns;
} Step;

// A thread's share of the work, its buffers, and the layer for which its rows were last prepared.
typedef struct {
    int64_t thread;
    float *h, *up;
    void *numbers;
    Block block;
    const Linear *ready;
} Share;

static void span(const Step *s, const Share *share, int64_t count, int64_t *from, int64_t *to) {
    int64_t part = rounded_up((count + s->threads - 1) / s->threads, 16);
    *from = least(share->thread * part, count);
    *to = least(*from + part, count);
}

static void norm(const Step *s, const float *weight, const float *x, float *out) {
    int64_t hidden = s->d->hidden;
    float squares[8] = {0}, total = 0;
    for (int64_t i = 0; i < hidden; i++) squares[i & 7] += x[i] * x[i];
    for (int i = 0; i < 8; i++) total += squares[i];
    float scale = 1.0f / sqrtf(total / (float)hidden + (float)s->d->norm_eps);
    for (int64_t i = 0; i < hidden; i++) out[i] = x[i] * scale * weight[i];
}

static void norm_rows(const Step *s, const Share *share, const float *weight) {
    int64_t hidden = s->d->hidden;
    for (int64_t row = 0; row < s->rows; row++)
        norm(s, weight, s->x + row * hidden, share->h + row * hidden);
}

// Converts all rows of x to a layer's input format; skipped if the previous layer used the same
// rows in the same format.
static void prepare(const Step *s, Share *share, const Linear *linear, const float *x) {
    const Norm none = {NO_NORM, 0, NULL, NULL};
    int done = share->ready && reads_alike(share->ready, linear);
    share->ready = linear;
    if (done || linear->kind == FLOAT32) return;
    lay_out_block(&share->block, share->numbers, s->rows, linear->in);
    prepare_block(&share->block, linear, &none, x, linear->in);
}

// Channels from .. to of a layer for the prepared rows; `out` and the finish begin with `from`.
static void product(const Step *s, const Share *share, const Linear *linear, const float *x,
                    int64_t from, int64_t to, const Finish *finish, float *out, int64_t stride) {
    int64_t count = to - from;
    if (linear->kind != FLOAT32) {
        multiply_block(linear, &share->block, from, to, finish, out, stride);
        return;
    }
    if (!finish->activation && !finish->times && !finish->plus) {
        multiply_floats(linear, x, s->rows, linear->in, from, to, out, stride);
        return;
    }
    multiply_floats(linear, x, s->rows, linear->in, from, to, share->up, count);
    for (int64_t row = 0; row < s->rows; row++) {
        float *y = share->up + row * count;
        activate(finish->activation, y, count);
        for (int64_t i = 0; finish->times && i < count; i++)
            y[i] *= finish->times[row * finish->stride + i];
        for (int64_t i = 0; finish->plus && i < count; i++)
            y[i] += finish->plus[row * finish->stride + i];
        memcpy(out + row * stride, y, (size_t)count * 4);
    }
}

// One thread's channels of a layer: out[row][channel] = or += the result.
static void share_of(const Step *s, Share *share, const Linear *linear, const float *x, float *out,
                     int64_t stride, int add) {
    int64_t from, to;
    span(s, share, linear->out, &from, &to);
    Finish finish = {NONE, NULL, add ? out + from : NULL, stride};
    prepare(s, share, linear, x);
    product(s, share, linear, x, from, to, &finish, out + from, stride);
}

static void attention(const Step *s, const Share *share, int64_t layer) {
    const Decoder *d = s->d;
    int64_t group = d->heads / d->kv_heads, width = d->head_dim, slot = width + 2;
    int64_t all = (d->heads + 2 * d->kv_heads) * width;
    for (int64_t item = share->thread; item < s->rows * d->kv_heads * s->parts; item += s->threads) {
        int64_t part = item % s->parts, head = item / s->parts % d->kv_heads;
        int64_t row = item / s->parts / d->kv_heads, past = s->slot[row].past;
        int64_t begin = s->slot[row].first + part * CHUNK, end = least(begin + CHUNK, past + 1);
        int64_t base = head * s->slot[row].capacity;
        void *keys = s->keys[row * d->layers + layer], *values = s->values[row * d->layers + layer];
        const float *turns = s->turns + row * width, *mixed = s->mixed + row * all;
        float query[MOST_QUERIES], key[MOST_WIDTH];
        float *partial = s->partial + (item / s->parts * s->parts + part) * group * slot;
        if (begin > past) continue;
        if (end == past + 1) {  // the part with the new token also stores it
            memcpy(key, mixed + (d->heads + head) * width, (size_t)width * 4);
            rotate(width, turns, key);
            write_cache(d, keys, (base + past) * width, key);
            write_cache(d, values, (base + past) * width,
                        mixed + (d->heads + d->kv_heads + head) * width);
        }
        memcpy(query, mixed + head * group * width, (size_t)(group * width) * 4);
        for (int64_t h = 0; h < group; h++) rotate(width, turns, query + h * width);
        attend(d, end - begin, (base + begin) * width, query, keys, values, partial);
    }
}

static void join_rows(const Step *s, const Share *share) {
    const Decoder *d = s->d;
    int64_t group = d->heads / d->kv_heads, width = d->head_dim, slot = width + 2;
    for (int64_t row = 0; row < s->rows; row++) {
        int64_t seen = s->slot[row].past + 1 - s->slot[row].first;
        int64_t parts = (seen + CHUNK - 1) / CHUNK;
        for (int64_t h = 0; h < d->heads; h++) {
            int64_t at = (row * d->kv_heads + h / group) * s->parts * group + h % group;
            join(width, parts, s->partial + at * slot, group * slot,
                 share->h + (row * d->heads + h) * width);
        }
    }
}

static void gated(const Step *s, Share *share, const Layer *layer) {
    int64_t from, to, inner = s->d->intermediate;
    span(s, share, inner, &from, &to);
    Finish plain = {NONE, NULL, NULL, inner};
    Finish gate = {s->d->activation, s->inner + from, NULL, inner};
    prepare(s, share, &layer->up, share->h);
    product(s, share, &layer->up, share->h, from, to, &plain, s->inner + from, inner);
    prepare(s, share, &layer->gate, share->h);
    product(s, share, &layer->gate, share->h, from, to, &gate, s->inner + from, inner);
}

static void all_layers(const Step *s, Share *share, float *logits) {
    const Decoder *d = s->d;
    int64_t width = d->head_dim, all = (d->heads + 2 * d->kv_heads) * width;
    for (int64_t i = 0; i < d->layers; i++) {
        const Layer *layer = d->layer + i;
        norm_rows(s, share, layer->attention_norm);
        share->ready = NULL;
        share_of(s, share, &layer->query, share->h, s->mixed, all, 0);
        share_of(s, share, &layer->key, share->h, s->mixed + d->heads * width, all, 0);
        share_of(s, share, &layer->value, share->h, s->mixed + (d->heads + d->kv_heads) * width,
                 all, 0);
#pragma omp barrier
        attention(s, share, i);
#pragma omp barrier
        join_rows(s, share);
        share->ready = NULL;
        share_of(s, share, &layer->out, share->h, s->x, d->hidden, 1);
#pragma omp barrier
        norm_rows(s, share, layer->mlp_norm);
        share->ready = NULL;
        gated(s, share, layer);
#pragma omp barrier
        share->ready = NULL;
        share_of(s, share, &layer->down, s->inner, s->x, d->hidden, 1);
#pragma omp barrier
    }
    norm_rows(s, share, d->norm);
    share->ready = NULL;
    share_of(s, share, &d->head, share->h, logits, d->head.out, 0);
}

static float *take(char **memory, int64_t floats) {
    float *at = (float *)*memory;
    *memory += rounded_up(floats * 4, 64);
    return at;
}

// Appends one token per sequence to its cache and computes the logits of the next one.
//   embeddings (rows, hidden), logits (rows, head.out); keys, values (rows, layers): buffers of
//   (kv_heads, capacity, head_dim) each.
// Returns 0, or 1 when memory runs out.
int decode_step(const Decoder *d, int64_t rows, const CacheSlot *slot, void *const *keys,
                void *const *values, const float *embeddings, float *logits, int threads) {
    int64_t width = d->head_dim, parts = 1;
    for (int64_t row = 0; row < rows; row++) {
        int64_t own = (slot[row].past - slot[row].first) / CHUNK + 1;
        parts = own > parts ? own : parts;
    }
    int64_t wide = d->heads * width > d->intermediate ? d->heads * width : d->intermediate;
    wide = d->hidden > wide ? d->hidden : wide;
    int64_t shared = rows * (d->hidden + (d->heads + 2 * d->kv_heads) * width + d->intermediate +
                             width + d->heads * parts * (width + 2));
    int64_t numbers = block_bytes(rows, wide);
    int64_t own = rounded_up(rows * wide * 8 + numbers + 256, 64);
    char *memory = malloc((size_t)(shared * 4 + 512 + own * threads)), *at;
    if (!memory) return 1;
    at = (char *)rounded_up((int64_t)(intptr_t)memory, 64);
    Step step = {d, rows, parts, 1, slot, keys, values, 0, 0, 0, 0, 0};
    step.x = take(&at, rows * d->hidden);
    step.mixed = take(&at, rows * (d->heads + 2 * d->kv_heads) * width);
    step.inner = take(&at, rows * d->intermediate);
    step.turns = take(&at, rows * width);
    step.partial = take(&at, rows * d->heads * parts * (width + 2));
    memcpy(step.x, embeddings, (size_t)(rows * d->hidden) * 4);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width / 2; i++) {
            float angle = (float)(slot[row].past - slot[row].first) * d->frequencies[i];
            step.turns[row * width + i] = cosf(angle);
            step.turns[row * width + width / 2 + i] = sinf(angle);
        }
#pragma omp parallel num_threads(threads)
    {
        Share share = {0};
#if defined(_OPENMP)
        share.thread = omp_get_thread_num();
#pragma omp single
        step.threads = omp_get_num_threads();  // the system may provide fewer than requested
#endif
        char *mine = at + share.thread * own;
        share.h = take(&mine, rows * wide);
        share.up = take(&mine, rows * wide);
        share.numbers = mine;
        all_layers(&step, &share, logits);
    }
    free(memory);
    return 0;
}
