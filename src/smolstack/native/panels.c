// Weights as panels of 16 output channels, rows made ready for them, and their product.
//
// A panel holds 16 channels side by side, four bytes of each at a time (a step), so that a vector
// of products belongs to 16 outputs and needs no summing across: the same order for one row, which
// streams through the panels at the speed of memory, and for many, which share them.
#include "smolstack.h"

#include "wide.h"

static int64_t steps_of(int64_t kind, int64_t in) {
    return kind == INT4 ? in / 8 : kind == INT8 ? (in + 3) / 4 : (in + 1) / 2;
}

// Bytes that a layer's weights take as panels; INT4's scales take as many again as they are.
int64_t panel_bytes(int64_t kind, int64_t in, int64_t out) {
    return (out + 15) / 16 * steps_of(kind, in) * 64;
}

// Eight channels of a group, from the halves that lie 16 channels apart.
static uint32_t eight_channels(const uint8_t *group, int64_t step) {
    uint32_t four = 0;
    for (int64_t i = 0; i < 4; i++) {
        int64_t low = step * 8 + i, high = low + 4;
        uint32_t first = low < 16 ? group[low] & 15u : group[low - 16] >> 4;
        uint32_t second = high < 16 ? group[high] & 15u : group[high - 16] >> 4;
        four |= (first | second << 4) << (8 * i);
    }
    return four;
}

// (out, in) weights of a kind to panels.
void pack_panels(int64_t kind, const void *weight, int64_t in, int64_t out, void *panels) {
    int64_t steps = steps_of(kind, in), row_bytes = kind == INT4 ? in / 2 : kind == INT8 ? in : in * 2;
    uint32_t turn = kind == INT8 ? 0x80808080u : 0;  // int8 → 128 more, unsigned
#pragma omp parallel for
    for (int64_t panel = 0; panel < (out + 15) / 16; panel++) {
        uint32_t *to = (uint32_t *)panels + panel * steps * 16;
        for (int64_t lane = 0; lane < 16; lane++) {
            const char *from = (const char *)weight + (panel * 16 + lane) * row_bytes;
            for (int64_t s = 0; s < steps; s++) {
                uint32_t four = 0;
                if (panel * 16 + lane < out) {
                    if (kind == INT4)
                        four = eight_channels((const uint8_t *)from + s / 4 * 16, s % 4);
                    else
                        memcpy(&four, from + s * 4, (size_t)least(4, row_bytes - s * 4));
                }
                to[s * 16 + lane] = four ^ turn;
            }
        }
    }
}

// INT4's scales, (out, groups) to panels of (groups, 16).
void pack_scales(const uint16_t *scale, int64_t groups, int64_t out, uint16_t *panels) {
    for (int64_t o = 0; o < rounded_up(out, 16); o++)
        for (int64_t g = 0; g < groups; g++)
            panels[(o / 16 * groups + g) * 16 + o % 16] = o < out ? scale[o * groups + g] : 0;
}

#if defined(SIMD_WIDE)

int64_t block_bytes(int64_t rows, int64_t in) {
    rows = rounded_up(rows, TILE_ROWS);
    return rows * (rounded_up(in * 2, 64) + 8 + rounded_up(in, GROUP) / 8) +
           rounded_up(in, 16) * 4 + 320;
}

void lay_out_block(Block *block, void *memory, int64_t rows, int64_t in) {
    char *at = (char *)rounded_up((int64_t)(intptr_t)memory, 64);
    int64_t padded = rounded_up(rows, TILE_ROWS);
    block->rows = rows;
    block->scale = (float *)at, block->sums = (int32_t *)(at + padded * 4);
    at += rounded_up(padded * (8 + rounded_up(in, GROUP) / 8), 64);
    block->normed = (float *)at;
    at += rounded_up(in, 16) * 4;
    block->numbers = at;
}

// Mean and standard deviation taken out, or the root mean square; then the weights.
static const float *normalised(const Norm *norm, const float *x, int64_t in, float *out) {
    Wide sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    float mean = 0;
    if (norm->kind == NO_NORM) return x;
    if (norm->kind == LAYER_NORM) {
        for (int64_t i = 0; i < in; i += 16)
            sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(in - i), x + i));
        mean = _mm512_reduce_add_ps(sum) / (float)in;
    }
    for (int64_t i = 0; i < in; i += 16) {
        __mmask16 mask = lanes(in - i);
        Wide some = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + i),
                                        _mm512_set1_ps(mean));
        squares = _mm512_fmadd_ps(some, some, squares);
    }
    float scale = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)in + (float)norm->eps);
    for (int64_t i = 0; i < in; i += 16) {
        __mmask16 mask = lanes(in - i);
        Wide some = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), _mm512_set1_ps(mean));
        some = _mm512_mul_ps(_mm512_mul_ps(some, _mm512_set1_ps(scale)),
                             _mm512_maskz_loadu_ps(mask, norm->weight + i));
        if (norm->bias) some = _mm512_add_ps(some, _mm512_maskz_loadu_ps(mask, norm->bias + i));
        _mm512_mask_storeu_ps(out + i, mask, some);
    }
    return out;
}

// rint(x · 127 / max|x|) of a row, and its scale. INT8: the sum of the integers, times 128; INT4:
// of each group, times -8. That is what the weights' zero points add to a product.
static void quantise_row(int64_t kind, const float *x, int64_t in, int64_t stride, int8_t *q,
                         float *scale, int32_t *sums) {
    Wide most = _mm512_setzero_ps();
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < in; i += 16)
        most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(lanes(in - i), x + i)));
    float largest = _mm512_reduce_max_ps(most);
    Wide inverse = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0);
    for (int64_t i = 0; i < stride; i += 16) {
        Wide some = _mm512_maskz_loadu_ps(lanes(in - i), x + i);
        __m512i numbers = _mm512_cvtps_epi32(_mm512_mul_ps(some, inverse));
        total = _mm512_add_epi32(total, numbers);
        _mm_storeu_si128((__m128i *)(q + i), _mm512_cvtepi32_epi8(numbers));
        if (kind == INT4 && i % GROUP && i < in) {
            sums[i / GROUP] = -8 * _mm512_reduce_add_epi32(total);
            total = _mm512_setzero_si512();
        }
    }
    *scale = largest / 127.0f;
    if (kind == INT8) *sums = 128 * _mm512_reduce_add_epi32(total);
}

// Rows of x, `stride` floats apart, normalised and in the numbers that `linear` multiplies.
void prepare_block(Block *block, const Linear *linear, const Norm *norm, const float *x,
                   int64_t stride) {
    int64_t in = linear->in, sums = linear->kind == INT4 ? in / GROUP : 1;
    block->stride = rounded_up(linear->kind == BFLOAT16 ? in * 2 : in, 64);
    for (int64_t row = 0; row < block->rows; row++) {
        const float *from = normalised(norm, x + row * stride, in, block->normed);
        char *to = block->numbers + row * block->stride;
        if (linear->kind != BFLOAT16) {
            quantise_row(linear->kind, from, in, block->stride, (int8_t *)to, block->scale + row,
                         block->sums + row * sums);
            continue;
        }
        for (int64_t i = 0; i < block->stride / 2; i += 16)
            _mm256_storeu_si256((__m256i *)(to + i * 2),
                                to_bfloat(_mm512_maskz_loadu_ps(lanes(in - i), from + i)));
    }
}

// Where a tile's sums go: row and channel of `out`, which begins with channel `from`.
typedef struct {
    const Linear *linear;
    const Block *x;
    const Finish *finish;
    float *out;
    int64_t from, stride;
} Target;

INLINE void put_tile(const Target *t, int64_t kind, int rows, int panels, int64_t row,
                     int64_t channel, Sums total) {
    const Linear *linear = t->linear;
    const Finish *finish = t->finish;
    UNROLL for (int p = 0; p < panels; p++) {
        int64_t at = channel + p * PANEL;
        __mmask16 mask = lanes(linear->out - at);
        Wide scale = _mm512_setzero_ps(), bias = _mm512_setzero_ps();
        if (kind == INT8) scale = _mm512_maskz_loadu_ps(mask, (const float *)linear->scale + at);
        if (linear->bias) bias = _mm512_maskz_loadu_ps(mask, linear->bias + at);
        UNROLL for (int r = 0; r < rows; r++) {
            if (row + r >= t->x->rows) continue;
            Wide y = _mm512_castsi512_ps(total[r][p]);
            if (kind == INT8)
                y = _mm512_cvtepi32_ps(
                    _mm512_sub_epi32(total[r][p], _mm512_set1_epi32(t->x->sums[row + r])));
            if (kind != BFLOAT16) y = _mm512_mul_ps(y, _mm512_set1_ps(t->x->scale[row + r]));
            if (kind == INT8) y = _mm512_mul_ps(y, scale);
            if (linear->bias) y = _mm512_add_ps(y, bias);
            y = activate_wide(finish->activation, y);
            int64_t beside = (row + r) * finish->stride + at - t->from;
            if (finish->times)
                y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, finish->times + beside));
            if (finish->plus)
                y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, finish->plus + beside));
            _mm512_mask_storeu_ps(t->out + (row + r) * t->stride + at - t->from, mask, y);
        }
    }
}

#define TILE(NAME, KIND, ROWS, PANELS)                                                          \
    static void NAME##_##ROWS##_##PANELS(const Target *t, int64_t row, int64_t channel) {       \
        Sums total;                                                                             \
        int64_t steps = steps_of(KIND, t->linear->in), apart = steps * STEP_BYTES;              \
        sum_panels(KIND, ROWS, PANELS, t->x->numbers + row * t->x->stride, t->x->stride,        \
                   (const char *)t->linear->weight + channel / PANEL * apart, apart, steps,     \
                   total);                                                                      \
        put_tile(t, KIND, ROWS, PANELS, row, channel, total);                                   \
    }
#define GROUP_TILE(ROWS)                                                                        \
    static void int4_##ROWS(const Target *t, int64_t row, int64_t channel) {                    \
        Sums total;                                                                             \
        int64_t groups = t->linear->in / GROUP;                                                 \
        sum_groups(ROWS, t->x->numbers + row * t->x->stride, t->x->stride,                      \
                   t->x->sums + row * groups,                                                   \
                   (const char *)t->linear->weight + channel / PANEL * groups * 4 * STEP_BYTES, \
                   (const uint16_t *)t->linear->scale + channel * groups, groups, total);       \
        put_tile(t, INT4, ROWS, 1, row, channel, total);                                        \
    }
TILE(int8, INT8, 1, 1) TILE(int8, INT8, 8, 1) TILE(int8, INT8, 8, 2) TILE(int8, INT8, 8, 3)
TILE(bfloat, BFLOAT16, 1, 1) TILE(bfloat, BFLOAT16, 8, 1) TILE(bfloat, BFLOAT16, 8, 2)
TILE(bfloat, BFLOAT16, 8, 3) GROUP_TILE(1) GROUP_TILE(4) GROUP_TILE(8)

typedef void Tile(const Target *, int64_t row, int64_t channel);

// Channels from .. to (whole panels, or up to the last) of a layer for every row of a block, finished
// and into `out`, which like the finish begins with channel `from`.
void multiply_block(const Linear *linear, const Block *x, int64_t from, int64_t to,
                    const Finish *finish, float *out, int64_t stride) {
    static Tile *const tiles[4][4] = {
        [BFLOAT16] = {bfloat_1_1, bfloat_8_1, bfloat_8_2, bfloat_8_3},
        [INT8] = {int8_1_1, int8_8_1, int8_8_2, int8_8_3},
        [INT4] = {int4_1, int4_8},
    };
    const Target target = {linear, x, finish, out, from, stride};
    // A share may be empty. Its first panel would be another thread's last one.
    if (from >= to) return;
    int64_t end = (to + PANEL - 1) / PANEL;
    for (int64_t panel = from / PANEL; panel < end;) {
        int count = x->rows == 1 ? 1 : next_panels(end - panel);
        if (linear->kind == INT4) count = 1;  // wider tiles spill their sums: slower
        for (int64_t row = 0; row < x->rows; row += TILE_ROWS) {
            Tile *tile = tiles[linear->kind][x->rows == 1 ? 0 : count];
            if (linear->kind == INT4 && x->rows > 1 && x->rows - row <= 4) tile = int4_4;
            tile(&target, row, panel * PANEL);
        }
        panel += count;
    }
}

#endif
