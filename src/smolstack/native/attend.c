// Attention of many queries over many keys: products of bfloat16 pairs, softmax in float.
#include "smolstack.h"

#include <stdlib.h>

#include "wide.h"

#define QUERY_ROWS 64  // queries of one piece of work
#define LOG2_E 1.44269504f

#if defined(SIMD_WIDE)

INLINE Wide load_some(int64_t kind, const void *from, int64_t at, __mmask16 mask) {
    if (kind == CACHE_FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float *)from + at);
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)from + at);
    if (kind == CACHE_FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// One head's keys as panels of 16 keys, a step being two channels.
static void pack_keys(const Attention *a, int64_t from, uint32_t *to) {
    int64_t steps = (a->width + 1) / 2, padded = rounded_up(a->keys, PANEL);
    for (int64_t j = 0; j < padded; j++) {
        uint32_t pairs[rounded_up(steps, 8)], *panel = to + j / PANEL * steps * PANEL + j % PANEL;
        for (int64_t i = 0; i < a->width; i += 16) {
            __mmask16 mask = j < a->keys ? lanes(a->width - i) : 0;
            Wide some = load_some(a->kind, a->key, from + j * a->key_stride + i, mask);
            _mm256_storeu_si256((__m256i *)(pairs + i / 2), to_bfloat(some));
        }
        for (int64_t s = 0; s < steps; s++) panel[s * PANEL] = pairs[s];
    }
}

// One head's values as panels of 16 channels, a step being two keys.
static void pack_values(const Attention *a, int64_t from, uint32_t *to) {
    int64_t steps = rounded_up(a->keys, PANEL) / 2;
    for (int64_t i = 0; i < a->width; i += PANEL)
        for (int64_t s = 0; s < steps; s++) {
            __m512i two[2];
            for (int64_t k = 0; k < 2; k++) {
                __mmask16 mask = 2 * s + k < a->keys ? lanes(a->width - i) : 0;
                int64_t at = from + (2 * s + k) * a->key_stride + i;
                two[k] = _mm512_cvtepu16_epi32(to_bfloat(load_some(a->kind, a->value, at, mask)));
            }
            two[0] = _mm512_or_si512(two[0], _mm512_slli_epi32(two[1], 16));
            _mm512_storeu_si512(to + (i / PANEL * steps + s) * PANEL, two[0]);
        }
}

#define SUMS(PANELS)                                                                            \
    static void sums_##PANELS(const char *x, int64_t stride, const char *w, int64_t apart,      \
                              int64_t steps, float *out, int64_t wide) {                        \
        Sums total;                                                                             \
        sum_panels(BFLOAT16, TILE_ROWS, PANELS, x, stride, w, apart, steps, total);                        \
        UNROLL for (int r = 0; r < TILE_ROWS; r++)                                              \
            UNROLL for (int p = 0; p < PANELS; p++)                                             \
                _mm512_storeu_si512(out + r * wide + p * PANEL, total[r][p]);                   \
    }
SUMS(1) SUMS(2) SUMS(3)

// Eight rows of bfloat16 pairs times panels: out (8, panels · 16), `wide` floats apart.
static void multiply_tile(const char *x, int64_t stride, const char *w, int64_t apart,
                          int64_t steps, int64_t panels, float *out, int64_t wide) {
    for (int64_t panel = 0; panel < panels;) {
        int count = next_panels(panels - panel);
        const char *from = w + panel * apart;
        float *to = out + panel * PANEL;
        if (count == 3) sums_3(x, stride, from, apart, steps, to, wide);
        else if (count == 2) sums_2(x, stride, from, apart, steps, to, wide);
        else sums_1(x, stride, from, apart, steps, to, wide);
        panel += count;
    }
}

// The first `end` scores of a row to weights, in bfloat16 up to `padded`; one over their sum.
static float soften(const float *scores, int64_t end, int64_t padded, char *to) {
    Wide most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < end; i += 16)
        most = _mm512_mask_max_ps(most, lanes(end - i), most, _mm512_loadu_ps(scores + i));
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t i = 0; i < padded; i += 16) {
        __mmask16 mask = lanes(end - i);
        Wide power = _mm512_setzero_ps();
        if (mask)
            power = _mm512_maskz_mov_ps(
                mask, power_of_two(_mm512_sub_ps(_mm512_loadu_ps(scores + i), most)));
        sum = _mm512_add_ps(sum, power);
        _mm256_storeu_si256((__m256i *)(to + i * 2), to_bfloat(power));
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
}

// Memory of one thread: eight rows' queries, scores, weights and sums.
typedef struct {
    char *query, *weights;
    float *scores, *mixed;
} Scratch;

static int64_t scratch_bytes(const Attention *a) {
    int64_t keys = rounded_up(a->keys, PANEL), width = rounded_up(a->width, PANEL);
    return rounded_up(TILE_ROWS * (width * 6 + keys * 6), 64) + 64;
}

static Scratch scratch_at(const Attention *a, char *at) {
    int64_t keys = rounded_up(a->keys, PANEL), width = rounded_up(a->width, PANEL);
    Scratch s;
    s.scores = (float *)at, at += TILE_ROWS * keys * 4;
    s.mixed = (float *)at, at += TILE_ROWS * width * 4;
    s.weights = at, at += TILE_ROWS * keys * 2;
    s.query = at;
    return s;
}

// Eight queries of one head from row `row` on.
static void eight_queries(const Attention *a, int64_t head, int64_t row, const char *keys,
                          const char *values, const Scratch *s) {
    int64_t width = rounded_up(a->width, PANEL), padded = rounded_up(a->keys, PANEL);
    int64_t count = least(TILE_ROWS, a->rows - row), past = a->keys - a->rows;
    int64_t seen = a->causal ? past + row + count : a->keys, reach = rounded_up(seen, PANEL);
    int64_t steps = (a->width + 1) / 2, apart = steps * STEP_BYTES;
    Wide scale = _mm512_set1_ps(LOG2_E / sqrtf((float)a->width));  // scores are powers of two
    for (int64_t r = 0; r < count; r++) {
        const float *from = a->query + (row + r) * a->query_stride + head * a->width;
        for (int64_t i = 0; i < width; i += 16) {
            Wide some = _mm512_maskz_loadu_ps(lanes(a->width - i), from + i);
            _mm256_storeu_si256((__m256i *)(s->query + (r * width + i) * 2),
                                to_bfloat(_mm512_mul_ps(some, scale)));
        }
    }
    multiply_tile(s->query, width * 2, keys, apart, steps, reach / PANEL, s->scores, padded);
    float inverse[TILE_ROWS];
    for (int64_t r = 0; r < count; r++) {
        int64_t end = a->causal ? past + row + r + 1 : a->keys;
        inverse[r] = soften(s->scores + r * padded, end, reach, s->weights + r * padded * 2);
    }
    apart = padded / 2 * STEP_BYTES;
    multiply_tile(s->weights, padded * 2, values, apart, reach / 2, width / PANEL, s->mixed, width);
    for (int64_t r = 0; r < count; r++) {
        float *to = a->out + ((row + r) * a->heads + head) * a->width;
        for (int64_t i = 0; i < a->width; i += 16) {
            Wide some = _mm512_mul_ps(_mm512_loadu_ps(s->mixed + r * width + i),
                                      _mm512_set1_ps(inverse[r]));
            _mm512_mask_storeu_ps(to + i, lanes(a->width - i), some);
        }
    }
}

// All heads of one sequence. Returns 1 when memory runs out, else 0.
int attend_rows(const Attention *a, int threads) {
    int64_t padded = rounded_up(a->keys, PANEL), group = a->heads / a->kv_heads;
    int64_t key_bytes = padded * (a->width + 1) / 2 * 4;
    int64_t value_bytes = padded * rounded_up(a->width, PANEL) * 2;
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
            // The longest rows of a causal head first, so that nobody is left with one at the end.
            int64_t head = item % a->heads, block = blocks - 1 - item / a->heads;
            const char *at = packed + head / group * of_head;
            int64_t end = least((block + 1) * QUERY_ROWS, a->rows);
            for (int64_t row = block * QUERY_ROWS; row < end; row += TILE_ROWS)
                eight_queries(a, head, row, at, at + key_bytes, &scratch);
        }
    }
    free(memory);
    return 0;
}

#endif
