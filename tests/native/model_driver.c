// Runs linear layers, the vision tower, prompts and decode steps of odd shapes without Python, and
// compares them with sums in double precision. A row's result must not depend on the rows and
// threads beside it. Prints a digest of what float32 models give, which is the same in every set of
// instructions with fused multiply-add. Ends with 0 when all is near.
#include <stdio.h>
#include <stdlib.h>

#include "vector_formats.h"

int64_t panel_bytes(int64_t kind, int64_t in, int64_t out);
void pack_panels(int64_t kind, const void *weight, int64_t row_bytes, int64_t in, int64_t out,
                 void *panels, int threads);
int round_weight(int64_t bits, const Stored *s, const float *importance, int64_t group, void *panels,
                 uint8_t *words, int64_t row_bytes, uint16_t *scales, uint8_t *zeros, int threads);
int encode_tiles(const Encoder *e, int64_t tiles, int64_t patches, float *x, int threads);
int prefill_rows(const Decoder *d, int64_t sequences, const int64_t *counts, const CacheSlot *slot,
                 void *const *keys, void *const *values, float *x, int threads);
int decode_step(const Decoder *d, int64_t rows, const CacheSlot *slot, void *const *keys,
                void *const *values, const float *embeddings, float *logits, int threads);

enum { LAYERS = 2, GROUP = 32 };
static const char *const KINDS[] = {"float32", "bfloat16", "int8", "int4"};
// The largest error of a layer, relative to the largest sum of magnitudes; of a whole model,
// relative to its largest result.
static const double NEAR[] = {5e-7, 3e-3, 0.01, 0.06}, NEAR_MODEL[] = {5e-6, 0.015, 0.05, 0.5};

static int failed;
static void expect(int holds, const char *what, int64_t kind, double found) {
    if (!holds) printf("%s, %s: %g\n", KINDS[kind], what, found);
    failed |= !holds;
}

static uint32_t state = 1;
static float drawn(void) {
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / (1 << 23) - 1;
}
static void *space(int64_t bytes) {
    void *memory = aligned_alloc(64, (size_t)rounded_up(bytes + 1, 64));
    return memset(memory, 0, (size_t)rounded_up(bytes + 1, 64));
}
static float *draw(int64_t count, float by, float plus) {
    float *out = space(count * 4);
    for (int64_t i = 0; i < count; i++) out[i] = drawn() * by + plus;
    return out;
}

static uint64_t digest = 1469598103934665603u;  // FNV-1a
static void note(int64_t kind, const float *x, int64_t count) {
    const uint8_t *from = (const uint8_t *)x;
    for (int64_t i = 0; kind == FLOAT32 && i < count * 4; i++)
        digest = (digest ^ from[i]) * 1099511628211u;
}

// A layer with the weights that it was made of, rounded to bfloat16 unless it is float32.
typedef struct {
    float *weight;
    Linear linear;
} Made;

static Made layer_of(int64_t kind, int64_t in, int64_t out, int biased) {
    int64_t channels = rounded_up(out, 16), groups = (in + GROUP - 1) / GROUP;
    Made made = {draw(in * out, 2 / sqrtf((float)in), 0), {kind, in, out, GROUP, 0, 0, 0, 0, 0}};
    Linear *linear = &made.linear;
    linear->bias = biased ? draw(out, 0.1f, 0) : NULL;
    linear->weight = made.weight;
    if (kind == FLOAT32) return made;
    uint16_t *half = space(in * out * 2);
    for (int64_t i = 0; i < in * out; i++) {
        uint32_t bits;
        memcpy(&bits, made.weight + i, 4);
        half[i] = (uint16_t)(bits >> 16), bits &= 0xffff0000u;
        memcpy(made.weight + i, &bits, 4);
    }
    int64_t bytes = panel_bytes(kind, in, out);
    char *panels = space(bytes + channels * groups * 3);
    linear->weight = panels;
    if (kind == BFLOAT16)
        pack_panels(kind, half, in * 2, in, out, panels, 1);
    else {
        const Stored stored = {STORED_BFLOAT16, in, out, half, NULL, NULL};
        float *importance = draw(in, 0, 1);
        linear->scale = (const uint16_t *)(const void *)(panels + bytes);
        linear->zeros = (const uint8_t *)(linear->scale + channels * groups);
        failed |= round_weight(kind == INT8 ? 8 : 4, &stored, importance, GROUP, panels, NULL, 0,
                               NULL, NULL, 1);
    }
    return made;
}

// ---- the same in double precision ----

static double *as_doubles(const float *x, int64_t count) {
    double *out = malloc((size_t)count * 8);
    for (int64_t i = 0; i < count; i++) out[i] = x[i];
    return out;
}
static double *times(const Made *made, const double *x, int64_t rows) {
    int64_t in = made->linear.in, out = made->linear.out;
    double *y = malloc((size_t)(rows * out) * 8);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t o = 0; o < out; o++) {
            double sum = made->linear.bias ? made->linear.bias[o] : 0;
            for (int64_t i = 0; i < in; i++) sum += x[r * in + i] * made->weight[o * in + i];
            y[r * out + o] = sum;
        }
    return y;
}
static double *normed(const Norm *norm, const double *x, int64_t rows, int64_t in) {
    double *y = malloc((size_t)(rows * in) * 8);
    for (int64_t r = 0; r < rows; r++, x += in) {
        double mean = 0, squares = 0;
        for (int64_t i = 0; norm->kind == LAYER_NORM && i < in; i++) mean += x[i] / (double)in;
        for (int64_t i = 0; i < in; i++) squares += (x[i] - mean) * (x[i] - mean) / (double)in;
        for (int64_t i = 0; i < in; i++)
            y[r * in + i] = (x[i] - mean) / sqrt(squares + norm->eps) * norm->weight[i] +
                            (norm->bias ? norm->bias[i] : 0);
    }
    return y;
}
static void plus(double *x, double *y, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] += y[i];
    free(y);
}
static double active(int64_t activation, double x) {
    if (activation == SILU) return x / (1 + exp(-x));
    if (activation == RELU) return x > 0 ? x : 0;
    if (activation == GELU) return x * (1 + erf(x * M_SQRT1_2)) / 2;
    return x * (1 + tanh(0.7978845608 * (x + 0.044715 * x * x * x))) / 2;
}
static void turned(double *x, int64_t position, int64_t width, const float *frequencies) {
    for (int64_t i = 0; i < width / 2; i++) {
        double a = x[i], b = x[i + width / 2], angle = (double)position * frequencies[i];
        x[i] = a * cos(angle) - b * sin(angle);
        x[i + width / 2] = b * cos(angle) + a * sin(angle);
    }
}
// Attention of every row over all rows, or (causal) over those up to it.
static double *seen(const double *q, const double *k, const double *v, int64_t rows, int64_t heads,
                    int64_t kv_heads, int64_t width, int causal) {
    double *out = calloc((size_t)(rows * heads * width), 8), *weight = malloc((size_t)rows * 8);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++) {
            int64_t end = causal ? r + 1 : rows, own = h / (heads / kv_heads);
            const double *query = q + (r * heads + h) * width;
            double sum = 0, *to = out + (r * heads + h) * width;
            for (int64_t j = 0; j < end; j++) {
                double score = 0;
                for (int64_t i = 0; i < width; i++)
                    score += query[i] * k[(j * kv_heads + own) * width + i];
                weight[j] = exp(score / sqrt((double)width)), sum += weight[j];
            }
            for (int64_t j = 0; j < end; j++)
                for (int64_t i = 0; i < width; i++)
                    to[i] += weight[j] / sum * v[(j * kv_heads + own) * width + i];
        }
    free(weight);
    return out;
}

static double distance(const double *expected, const float *found, int64_t count) {
    double most = 0, largest = 1e-30;
    for (int64_t i = 0; i < count; i++) {
        double off = fabs(expected[i] - found[i]);
        if (!(off <= most)) most = off;  // NaN too
        largest = fmax(largest, fabs(expected[i]));
    }
    return most / largest;
}

// ---- what is compared ----

// x rounded to float16.
static uint16_t halved(float x) {
    float some[LANES];
    uint16_t out[LANES];
    for (int i = 0; i < LANES; i++) some[i] = x;
    store_halfs(out, load(some));
    return out[LANES - 1];
}

// Every positive float16 number, and those between it and the next: ties go to even ones.
static void check_halfs(void) {
    for (uint16_t half = 0; half < 0x7c00; half++) {
        uint16_t all[LANES];
        float some[LANES], next, x;
        double exact = half < 0x400 ? half * 0x1p-24 : (half % 1024 + 1024) * exp2(half / 1024 - 25);
        for (int i = 0; i < LANES; i++) all[i] = (uint16_t)(half + i / 15);
        store(some, load_halfs(all)), x = some[0], next = half == 0x7bff ? 65536 : some[15];
        float middle = (x + next) / 2;
        int right = x == exact && halved(x) == half && halved(-x) == (half | 0x8000) &&
                    halved(middle) == half + half % 2 && halved(nextafterf(middle, 0)) == half &&
                    halved(nextafterf(middle, next)) == half + 1;
        expect(right, "a number of 16 bits", FLOAT32, x);
    }
    expect(halved(INFINITY) == 0x7c00 && halved(1e30f) == 0x7c00 && halved(NAN) % 0x8000 > 0x7c00,
           "no number of 16 bits", FLOAT32, 0);
}

static void check_layer(int64_t kind, int64_t rows, int64_t in, int64_t out) {
    Made made = layer_of(kind, in, out, (int)(out & 1));
    const Norm none = {NO_NORM, 0, NULL, NULL};
    float *x = draw(rows * in, 1, 0), *y = space(rows * out * 4), *alone = space(out * 4);
    failed |= dense_rows(&made.linear, &none, x, rows, NONE, NULL, y, 3);
    double most = 0, largest = 1e-30;
    for (int64_t r = 0; r < rows; r++) {
        failed |= dense_rows(&made.linear, &none, x + r * in, 1, NONE, NULL, alone, 1);
        expect(!memcmp(alone, y + r * out, (size_t)out * 4), "a row by itself", kind, (double)r);
        for (int64_t o = 0; o < out; o++) {
            double sum = made.linear.bias ? made.linear.bias[o] : 0, size = 0;
            for (int64_t i = 0; i < in; i++) {
                double product = (double)x[r * in + i] * made.weight[o * in + i];
                sum += product, size += fabs(product);
            }
            most = fmax(most, fabs(sum - y[r * out + o])), largest = fmax(largest, size);
        }
    }
    expect(most / largest < NEAR[kind], "a layer", kind, most / largest);
    note(kind, y, rows * out);
}

static void check_encoder(int64_t kind, int64_t activation, int64_t heads, int64_t width,
                          int64_t inner, int64_t patches) {
    int64_t hidden = heads * width, count = patches * hidden, tiles = 2;
    Made made[LAYERS][6];
    EncoderLayer layers[LAYERS];
    for (int i = 0; i < LAYERS; i++) {
        for (int j = 0; j < 6; j++)
            made[i][j] = layer_of(kind, j == 5 ? inner : hidden, j == 4 ? inner : hidden, 1);
        const Norm norms[] = {{LAYER_NORM, 1e-6, draw(hidden, 0.1f, 1), draw(hidden, 0.1f, 0)},
                              {LAYER_NORM, 1e-6, draw(hidden, 0.1f, 1), draw(hidden, 0.1f, 0)}};
        layers[i] = (EncoderLayer){norms[0],          norms[1],          made[i][0].linear,
                                   made[i][1].linear, made[i][2].linear, made[i][3].linear,
                                   made[i][4].linear, made[i][5].linear};
    }
    const Encoder encoder = {LAYERS, hidden, heads, activation, layers};
    float *x = draw(tiles * count, 1, 0), *alone = space(count * 4);
    memcpy(alone, x + count, (size_t)count * 4);
    double *expected = as_doubles(x + count, count);
    failed |= encode_tiles(&encoder, tiles, patches, x, 3);
    failed |= encode_tiles(&encoder, 1, patches, alone, 1);
    expect(!memcmp(alone, x + count, (size_t)count * 4), "a tile by itself", kind, 0);
    for (int i = 0; i < LAYERS; i++) {
        double *h = normed(&layers[i].attention_norm, expected, patches, hidden);
        double *q = times(&made[i][0], h, patches), *k = times(&made[i][1], h, patches);
        double *v = times(&made[i][2], h, patches);
        double *mixed = seen(q, k, v, patches, heads, heads, width, 0);
        plus(expected, times(&made[i][3], mixed, patches), count);
        double *between = normed(&layers[i].mlp_norm, expected, patches, hidden);
        double *up = times(&made[i][4], between, patches);
        for (int64_t j = 0; j < patches * inner; j++) up[j] = active(activation, up[j]);
        plus(expected, times(&made[i][5], up, patches), count);
        free(h), free(q), free(k), free(v), free(mixed), free(between), free(up);
    }
    double far = distance(expected, alone, count);
    expect(far < NEAR_MODEL[kind], "a tile", kind, far);
    note(activation == GELU ? -1 : kind, x, tiles * count);  // erff is the system's own
    free(expected);
}

// The last token's logits of one sequence.
static double *last_logits(const Decoder *d, Made made[LAYERS][7], const Made *head, const float *x,
                           int64_t rows) {
    int64_t width = d->head_dim, inner = d->intermediate, hidden = d->hidden;
    double *states = as_doubles(x, rows * hidden);
    for (int i = 0; i < LAYERS; i++) {
        const Norm before = {RMS_NORM, d->norm_eps, d->layer[i].attention_norm, NULL};
        const Norm between = {RMS_NORM, d->norm_eps, d->layer[i].mlp_norm, NULL};
        double *h = normed(&before, states, rows, hidden);
        double *q = times(&made[i][0], h, rows), *k = times(&made[i][1], h, rows);
        double *v = times(&made[i][2], h, rows);
        for (int64_t j = 0; j < rows * d->heads; j++)
            turned(q + j * width, j / d->heads, width, d->frequencies);
        for (int64_t j = 0; j < rows * d->kv_heads; j++)
            turned(k + j * width, j / d->kv_heads, width, d->frequencies);
        double *mixed = seen(q, k, v, rows, d->heads, d->kv_heads, width, 1);
        plus(states, times(&made[i][3], mixed, rows), rows * hidden);
        double *g = normed(&between, states, rows, hidden);
        double *gate = times(&made[i][4], g, rows), *up = times(&made[i][5], g, rows);
        for (int64_t j = 0; j < rows * inner; j++) up[j] *= active(d->activation, gate[j]);
        plus(states, times(&made[i][6], up, rows), rows * hidden);
        free(h), free(q), free(k), free(v), free(mixed), free(g), free(gate), free(up);
    }
    const Norm last = {RMS_NORM, d->norm_eps, d->norm, NULL};
    double *h = normed(&last, states + (rows - 1) * hidden, 1, hidden), *out = times(head, h, 1);
    free(states), free(h);
    return out;
}

static void check_decoder(int64_t kind, int64_t cache, int64_t longest, int64_t kv_heads,
                          int64_t group, int64_t width, int64_t hidden, int64_t inner) {
    enum { SEQUENCES = 2, CAPACITY = 192, WORDS = 37 };
    int64_t heads = kv_heads * group, q = heads * width, kv = kv_heads * width;
    const int64_t counts[SEQUENCES] = {longest, 21};
    Made made[LAYERS][7], head = layer_of(kind, hidden, WORDS, 0);
    Layer layers[LAYERS];
    for (int i = 0; i < LAYERS; i++) {
        const int64_t in[] = {hidden, hidden, hidden, q, hidden, hidden, inner};
        const int64_t out[] = {q, kv, kv, hidden, inner, inner, hidden};
        for (int j = 0; j < 7; j++) made[i][j] = layer_of(kind, in[j], out[j], 0);
        layers[i] = (Layer){draw(hidden, 0.1f, 1), draw(hidden, 0.1f, 1), made[i][0].linear,
                            made[i][1].linear,     made[i][2].linear,     made[i][3].linear,
                            made[i][4].linear,     made[i][5].linear,     made[i][6].linear};
    }
    float *frequencies = draw(width / 2, 0.5f, 0.5f), *norm = draw(hidden, 0.1f, 1);
    const Decoder d = {LAYERS, hidden, inner, heads, kv_heads, width, SILU, cache, 1e-5,
                       frequencies, norm, layers, head.linear};
    float *x[SEQUENCES], *states = space((counts[0] + counts[1]) * hidden * 4), *at = states;
    float *last = space(SEQUENCES * hidden * 4), *logits = space(SEQUENCES * WORDS * 4);
    float alone[WORDS];
    void *keys[SEQUENCES * LAYERS], *values[SEQUENCES * LAYERS];
    CacheSlot slots[SEQUENCES];
    for (int i = 0; i < SEQUENCES * LAYERS; i++) {  // exactly as large as needed
        keys[i] = malloc((size_t)(kv * CAPACITY * (cache == CACHE_FLOAT32 ? 4 : 2)));
        values[i] = malloc((size_t)(kv * CAPACITY * (cache == CACHE_FLOAT32 ? 4 : 2)));
    }
    for (int s = 0; s < SEQUENCES; s++, at += counts[s - 1] * hidden) {
        x[s] = draw((counts[s] + 1) * hidden, 1, 0);
        memcpy(at, x[s], (size_t)(counts[s] * hidden) * 4);
        memcpy(last + s * hidden, x[s] + counts[s] * hidden, (size_t)hidden * 4);
        slots[s] = (CacheSlot){0, CAPACITY, 0};
    }
    failed |= prefill_rows(&d, SEQUENCES, counts, slots, keys, values, states, 3);
    for (int s = 0; s < SEQUENCES; s++) slots[s].past = counts[s];
    failed |= decode_step(&d, SEQUENCES, slots, keys, values, last, logits, 3);
    failed |= decode_step(&d, 1, slots + 1, keys + LAYERS, values + LAYERS, last + hidden, alone, 1);
    expect(!memcmp(alone, logits + WORDS, sizeof alone), "a sequence by itself", kind, 0);
    for (int s = 0; s < SEQUENCES; s++) {
        double *expected = last_logits(&d, made, &head, x[s], counts[s] + 1);
        double far = distance(expected, logits + s * WORDS, WORDS);
        double near = cache == CACHE_FLOAT32 ? NEAR_MODEL[kind] : fmax(NEAR_MODEL[kind], 0.005);
        expect(far < near, "logits", kind, far);
        free(expected);
    }
    note(kind, states, (counts[0] + counts[1]) * hidden);
    note(kind, logits, SEQUENCES * WORDS);
    for (int i = 0; i < SEQUENCES * LAYERS; i++) free(keys[i]), free(values[i]);
}

int main(void) {
    const int64_t shapes[][3] = {{1, 8, 1},     {5, 24, 17},  {3, 40, 33},  {9, 72, 48},
                                 {17, 136, 50}, {2, 312, 10}, {53, 96, 63}, {70, 65, 16}};
    check_halfs();
    for (int64_t kind = FLOAT32; kind <= INT4; kind++) {
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
            check_layer(kind, shapes[i][0], shapes[i][1], shapes[i][2]);
        check_encoder(kind, GELU_TANH, 3, 8, 40, 19);
        check_encoder(kind, GELU, 2, 36, 33, 50);
        check_decoder(kind, CACHE_FLOAT32, 150, 1, 3, 8, 24, 40);
        check_decoder(kind, CACHE_FLOAT16, 5, 2, 2, 24, 72, 33);
        check_decoder(kind, CACHE_BFLOAT16, 40, 1, 5, 16, 40, 95);
    }
    printf("digest %016llx\n", (unsigned long long)digest);
    return failed;
}
