// Weights as panels of 16 output channels, the preparation of rows for them, and their product.
//
// A panel interleaves 16 channels, four bytes of each at a time (a step). A vector of products then
// belongs to 16 outputs and needs no horizontal sum. The same layout serves one row, which streams
// the panels at memory speed, and many rows, which share them. The inner
// loops are sum_bytes, sum_nibbles and sum_pairs; with instructions for small matrices sum_blocks and
// sum_pair_blocks.
#include "product.h"

#include "vector_functions.h"

#define STEP_BYTES 64  // bytes of a panel per four bytes of a row
#define AHEAD 2048     // prefetch distance in bytes, from memory for one row
#define SOON 512       // and from the L2 cache for many

// Rows and panels accumulated in registers at once, by kind of weight. Integers need two sets of
// registers: one for a group's integer sums, one for the total.
#if defined(VECTOR_512)
#define INT8_ROWS 8
#define INT8_PANELS 3
#define INT4_ROWS 8
#elif defined(VECTOR_256) || BYTE_MATRICES
#define INT8_ROWS 4
#define INT8_PANELS 1
#define INT4_ROWS 4
#else
#define INT8_ROWS 2
#define INT8_PANELS 1
#define INT4_ROWS 2
#endif
#define PAIR_ROWS 8
#if defined(VECTOR_512)
#define PAIR_PANELS 3
#else
#define PAIR_PANELS 1
#endif
#define MOST_ROWS 8
#define MOST_PANELS 3

static int64_t steps_of(int64_t kind, int64_t in) {
    int64_t numbers = kind == INT4 ? 8 : kind == INT8 ? 4 : 2;
    return (in + numbers - 1) / numbers;
}

static int64_t groups_of(const Linear *linear) {
    return (linear->in + linear->group - 1) / linear->group;
}

// Bytes of a layer's weights as panels.
int64_t panel_bytes(int64_t kind, int64_t in, int64_t out) {
    return (out + PANEL - 1) / PANEL * steps_of(kind, in) * STEP_BYTES;
}

// Eight neighbouring channels, four bits each and two to a byte: the first four into the low halves
// of a step's bytes, the others into the high ones.
static uint32_t eight_channels(uint32_t neighbours) {
    uint32_t four = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t first = neighbours >> (4 * i) & 15, second = neighbours >> (4 * i + 16) & 15;
        four |= (first | second << 4) << (8 * i);
    }
    return four;
}

// Packs (out, in) weights of a kind, rows row_bytes apart, into panels. INT8 is stored with 128
// added, and INT4 with the lower channel in the lower half of a byte: compressed-tensors'
// "pack-quantized" form.
void pack_panels(int64_t kind, const void *weight, int64_t row_bytes, int64_t in, int64_t out,
                 void *panels, int threads) {
    int64_t steps = steps_of(kind, in);
    uint32_t empty = kind == INT8 ? 0x80808080u : 0, turn = WEIGHT_OFFSET ? 0 : empty;
    int64_t bytes = kind == INT4 ? (in + 1) / 2 : kind == INT8 ? in : in * 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t panel = 0; panel < (out + PANEL - 1) / PANEL; panel++) {
        uint32_t *to = (uint32_t *)panels + panel * steps * PANEL;
        for (int64_t lane = 0; lane < PANEL; lane++) {
            const char *from = (const char *)weight + (panel * PANEL + lane) * row_bytes;
            int64_t whole = panel * PANEL + lane < out ? bytes / 4 : 0;
            for (int64_t s = 0; s < steps; s++) {
                uint32_t four = empty;
                if (s < whole)
                    memcpy(&four, from + s * 4, 4);
                else if (panel * PANEL + lane < out)
                    memcpy(&four, from + s * 4, (size_t)(bytes - s * 4));
                to[s * PANEL + lane] = kind == INT4 ? eight_channels(four) : four ^ turn;
            }
        }
    }
}

// (out, groups) scales to (groups, 16) for every panel.
void pack_scales(const uint16_t *scale, int64_t groups, int64_t out, uint16_t *panels) {
    for (int64_t o = 0; o < rounded_up(out, PANEL); o++)
        for (int64_t g = 0; g < groups; g++)
            panels[(o / PANEL * groups + g) * PANEL + o % PANEL] = o < out ? scale[o * groups + g] : 0;
}

// Zero points, (out / 8, groups) words of eight channels, to (groups, 8 bytes) for every panel:
// lane i in the low half of byte i, lane i + 8 in the high half.
void pack_zeros(const uint32_t *zeros, int64_t groups, int64_t out, uint8_t *panels) {
    for (int64_t panel = 0; panel < (out + PANEL - 1) / PANEL; panel++)
        for (int64_t g = 0; g < groups; g++) {
            uint32_t low = zeros[2 * panel * groups + g], high = 0;
            if (2 * panel + 1 < (out + 7) / 8) high = zeros[(2 * panel + 1) * groups + g];
            for (int i = 0; i < 8; i++)
                panels[(panel * groups + g) * 8 + i] =
                    (uint8_t)((low >> (4 * i) & 15) | (high >> (4 * i) & 15) << 4);
        }
}

// The offset of 8-bit weights in panels of this library: 128 or 0. Libraries with the same offset
// can read each other's panels.
int64_t weight_offset(void) { return WEIGHT_OFFSET; }

// Offsets of a layer's parts in one block of memory: panels, scales, zero points.
static uint16_t *scales_behind(int64_t kind, int64_t in, int64_t out, void *memory) {
    return (uint16_t *)((char *)memory + panel_bytes(kind, in, out));
}
static uint8_t *zeros_behind(int64_t groups, int64_t out, uint16_t *scales) {
    return (uint8_t *)(scales + rounded_up(out, PANEL) * groups);
}

// Unpacks one group of a panel: 16 rows of `group` numbers (8 bits: with 128 added), their scales
// and (4 bits) zero points.
void fill_group(int64_t kind, int64_t in, int64_t out, int64_t group, void *memory, int64_t panel,
                int64_t g, const uint8_t *numbers, const uint16_t *scale, const uint8_t *zero) {
    int64_t steps = steps_of(kind, in), groups = (in + group - 1) / group;
    int64_t each = kind == INT4 ? 8 : 4, from = g * group / each;
    int64_t to = least(from + group / each, steps);
    uint32_t *at = (uint32_t *)memory + panel * steps * PANEL, turn = WEIGHT_OFFSET ? 0 : 0x80808080u;
    uint16_t *scales = scales_behind(kind, in, out, memory);
    for (int64_t s = from; s < to; s++)
        for (int64_t lane = 0; lane < PANEL; lane++) {
            const uint8_t *own = numbers + lane * group + (s - from) * each;
            uint32_t four, high;
            memcpy(&four, own, 4);
            if (kind == INT4) {
                memcpy(&high, own + 4, 4);
                at[s * PANEL + lane] = four | high << 4;
            } else
                at[s * PANEL + lane] = four ^ turn;
        }
    memcpy(scales + (panel * groups + g) * PANEL, scale, PANEL * 2);
    if (kind != INT4) return;
    uint8_t *zeros = zeros_behind(groups, out, scales) + (panel * groups + g) * 8;
    for (int i = 0; i < 8; i++) zeros[i] = (uint8_t)(zero[i] | zero[i + 8] << 4);
}

// The inverse of pack_panels, for 8 and 4 bits: rows of words, row_bytes apart.
void unpack_panels(int64_t kind, const void *panels, int64_t in, int64_t out, void *words,
                   int64_t row_bytes, int threads) {
    int64_t steps = steps_of(kind, in);
    uint32_t turn = WEIGHT_OFFSET ? 0 : 0x80808080u;
#pragma omp parallel for num_threads(threads)
    for (int64_t o = 0; o < out; o++) {
        const uint32_t *from = (const uint32_t *)panels + o / PANEL * steps * PANEL + o % PANEL;
        for (int64_t s = 0; s < steps; s++) {
            uint32_t four = from[s * PANEL], neighbours = 0;
            for (int i = 0; kind == INT4 && i < 4; i++) {
                neighbours |= (four >> (8 * i) & 15) << (4 * i);
                neighbours |= (four >> (8 * i + 4) & 15) << (4 * i + 16);
            }
            four = kind == INT4 ? neighbours : four ^ turn;
            char *to = (char *)words + o * row_bytes + s * 4;
            if (s * 4 + 4 <= row_bytes)
                memcpy(to, &four, 4);
            else
                memcpy(to, &four, (size_t)(row_bytes - s * 4));
        }
    }
}

// Space for any kind of rows: at most four bytes per number, a normalized copy of 16 rows, and panels
// converted to float32; the smallest groups have 16 channels.
int64_t block_bytes(int64_t rows, int64_t in) {
    int64_t wide = rounded_up(in, LANES);
    rows = rounded_up(rows, LANES);
    return rows * (rounded_up(in * 4, 256) + (in / 16 + 1) * 12) +
           wide * LANES * (FLOAT_PANELS + 1) * 4 + 512;
}

void lay_out_block(Block *block, void *memory, int64_t rows, int64_t in) {
    char *at = (char *)rounded_up((int64_t)(intptr_t)memory, 64);
    int64_t padded = rounded_up(rows, LANES), most = (in / 16 + 1) * 4, wide = rounded_up(in, LANES);
    block->rows = rows, block->padded = padded;
    block->scale = (float *)at, at += padded * most;
    block->weighed = (float *)at, at += padded * most;
    block->offset = (int32_t *)at, at += padded * most;
    block->normed = (float *)(at = (char *)rounded_up((int64_t)(intptr_t)at, 64));
    block->widened = block->normed + wide * LANES;
    block->numbers = (char *)(block->widened + wide * LANES * FLOAT_PANELS);
}

// Whether rows prepared for one layer can be used by another.
int reads_alike(const Linear *a, const Linear *b) {
    int integers = a->kind == INT8 || a->kind == INT4;
    if (a->in != b->in || integers != (b->kind == INT8 || b->kind == INT4)) return 0;
    return integers ? a->group == b->group && a->fine == b->fine : a->kind == b->kind;
}

// Layer norm or RMS norm, then the norm's weights.
static const float *normalized(const Norm *norm, const float *x, int64_t in, float *out) {
    Floats sum = splat(0), squares = splat(0);
    float mean = 0;
    if (norm->kind == NO_NORM) return x;
    if (norm->kind == LAYER_NORM) {
        for (int64_t i = 0; i < in; i += LANES) sum = add(sum, load_some(x + i, in - i));
        mean = sum_lanes(sum) / (float)in;
    }
    for (int64_t i = 0; i < in; i += LANES) {
        Floats some = sub(load_some(x + i, in - i), splat(mean));
        if (in - i < LANES) {  // unused lanes
            store_some(out + i, some, in - i);
            some = load_some(out + i, in - i);
        }
        squares = fma_lanes(some, some, squares);
    }
    float scale = 1.0f / sqrtf(sum_lanes(squares) / (float)in + (float)norm->eps);
    for (int64_t i = 0; i < in; i += LANES) {
        Floats some = mul(sub(load_some(x + i, in - i), splat(mean)), splat(scale));
        some = mul(some, load_some(norm->weight + i, in - i));
        if (norm->bias) some = add(some, load_some(norm->bias + i, in - i));
        store_some(out + i, some, in - i);
    }
    return out;
}

// A group of a row: rint(x · most / max|x|), its scale, and the sums for subtracting zero
// points. `count` channels are real, `padded` are written.
static void quantize_group(const Linear *linear, const float *x, int64_t count, int64_t padded,
                           int8_t *q, int64_t plane, float *scale, float *weighed,
                           int32_t *offset) {
    const float most = linear->fine ? 127 * RADIX + 126 : 127;
    Floats largest = splat(0);
    Ints total = splat_int(0);
    for (int64_t i = 0; i < count; i += LANES)
        largest = max_lanes(largest, abs_lanes(load_some(x + i, count - i)));
    float reach = largest_lane(largest), inverse = reach > 0 ? most / reach : 0;
    for (int64_t i = 0; i < padded; i += LANES) {
        Floats some = splat(0);
        if (i < count) some = mul(load_some(x + i, count - i), splat(inverse));
        Ints numbers = to_nearest(some);
        total = add_int(total, numbers);
        if (linear->fine) {
            Floats whole = rounded(some), first = rounded(mul(whole, splat(1.0f / RADIX)));
            store_low_bytes(q + i, to_nearest(first));
            store_low_bytes(q + plane + i, to_nearest(fma_lanes(first, splat(-RADIX), whole)));
        } else
            store_low_bytes(q + i, numbers);
    }
    int32_t sum = sum_ints(total);
    *scale = reach / most;
    *weighed = *scale * (float)sum;
    *offset = -WEIGHT_OFFSET * sum;
}

// Normalizes rows of x and lays them out as panels of 16.
static void prepare_floats(Block *block, const Norm *norm, const float *x, int64_t stride,
                           int64_t in) {
    for (int64_t row = 0; row < block->rows; row += LANES) {
        const float *from = x + row * stride;
        int64_t apart = stride;
        if (norm->kind != NO_NORM) {
            apart = rounded_up(in, LANES);
            for (int64_t r = 0; r < least(LANES, block->rows - row); r++)
                normalized(norm, from + r * stride, in, block->normed + r * apart);
            from = block->normed;
        }
        prepare_lanes(block, in, row, from, apart);
    }
}

// Normalizes rows of x, `stride` floats apart, and converts them to the input format of `linear`.
void prepare_block(Block *block, const Linear *linear, const Norm *norm, const float *x,
                   int64_t stride) {
    int64_t in = linear->in, integers = linear->kind == INT8 || linear->kind == INT4;
    if (linear->kind == FLOAT32) {
        prepare_floats(block, norm, x, stride, in);
        return;
    }
    block->plane = rounded_up(in, 64);
    block->stride = integers        ? block->plane * (linear->fine ? 2 : 1)
                    : PAIR_PRODUCTS ? rounded_up(in * 2, 64)
                                    : rounded_up(in * 4, 64);
    block->groups = integers ? groups_of(linear) : 0;
    for (int64_t row = 0; row < block->rows; row++) {
        const float *from = normalized(norm, x + row * stride, in, block->normed);
        char *to = block->numbers + row * block->stride;
        for (int64_t g = 0; g < block->groups; g++) {
            int64_t begin = g * linear->group, count = least(linear->group, in - begin);
            int64_t padded = g + 1 < block->groups ? count : block->plane - begin;
            int64_t at = g * block->padded + row;
            quantize_group(linear, from + begin, count, padded, (int8_t *)to + begin, block->plane,
                           block->scale + at, block->weighed + at, block->offset + at);
        }
        for (int64_t i = 0; !integers && i < rounded_up(in, 32); i += LANES) {
            Floats some = i < in ? load_some(from + i, in - i) : splat(0);
            if (PAIR_PRODUCTS)
                store_bfloats((uint16_t *)to + i, some);
            else if (i < rounded_up(in, LANES))
                store((float *)to + i, some);
        }
    }
}

// The panel that contains `channel`, and its groups' scales and zero points.
INLINE const char *panel_of(const Linear *linear, int64_t channel) {
    return (const char *)linear->weight +
           channel / PANEL * steps_of(linear->kind, linear->in) * STEP_BYTES;
}

#if BYTE_MATRICES
// sum_steps for an even number of rows, two steps at a time.
INLINE void sum_blocks(int rows, int panels, const char *x, int64_t stride, const char *w,
                       int64_t apart, int64_t from, int64_t to, Ints sum[MOST_ROWS][MOST_PANELS]) {
    Blocks total[MOST_ROWS / 2][MOST_PANELS];
    UNROLL for (int r = 0; r < rows; r += 2)
        UNROLL for (int p = 0; p < panels; p++) total[r / 2][p] = no_blocks();
    for (int64_t s = from; s < to; s += 2)
        UNROLL for (int p = 0; p < panels; p++) {
            const char *at = w + p * apart + s * STEP_BYTES;
            Ints low = load_bytes(at), high = splat_int(0);
            if (s + 1 < to) high = load_bytes(at + STEP_BYTES);
            prefetch(at + SOON);
            UNROLL for (int r = 0; r < rows; r += 2) {
                const char *row = x + r * stride + s * 4;
                total[r / 2][p] = dot_blocks(total[r / 2][p], low, high, two_rows(row, row + stride));
            }
        }
    UNROLL for (int r = 0; r < rows; r += 2)
        UNROLL for (int p = 0; p < panels; p++)
            add_blocks(total[r / 2][p], &sum[r][p], &sum[r + 1][p]);
}
#endif

// A row's four bytes from `x` on times the 16 channels of `panels` panels, for steps from .. to.
INLINE void sum_steps(int rows, int panels, const char *x, int64_t stride, const char *w,
                      int64_t apart, int64_t from, int64_t to, Ints sum[MOST_ROWS][MOST_PANELS]) {
#if BYTE_MATRICES
    if (rows > 1) {
        sum_blocks(rows, panels, x, stride, w, apart, from, to, sum);
        return;
    }
#endif
    for (int64_t s = from; s < to; s++) {
        Ints weight[MOST_PANELS];
        UNROLL for (int p = 0; p < panels; p++) {
            const char *at = w + p * apart + s * STEP_BYTES;
            weight[p] = load_bytes(at);
            prefetch(at + (rows == 1 ? AHEAD : SOON));
        }
        UNROLL for (int r = 0; r < rows; r++) {
            vi numbers = four_bytes(x + r * stride + s * 4);
            UNROLL for (int p = 0; p < panels; p++)
                sum[r][p] = dot(sum[r][p], weight[p], numbers);
        }
    }
}

// 8-bit weights: integer sums within a group, multiplied by the group's scales afterwards.
INLINE void sum_bytes(int fine, int rows, int panels, const Target *t, int64_t row,
                      int64_t channel, Floats total[MOST_ROWS][MOST_PANELS]) {
    const Linear *linear = t->linear;
    const Block *block = t->x;
    const char *x = block->numbers + row * block->stride, *w = panel_of(linear, channel);
    int64_t groups = block->groups, steps = steps_of(INT8, linear->in), of_group = linear->group / 4;
    int64_t apart = steps * STEP_BYTES, scales_apart = groups * PANEL;
    const uint16_t *scale = linear->scale + channel * groups;
    const int32_t *offset = block->offset + row;
    const float *own = block->scale + row;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < panels; p++) total[r][p] = splat(0);
    for (int64_t from = 0; from < steps; from += of_group) {
        int64_t to = least(from + of_group, steps);
        Ints sum[MOST_ROWS][MOST_PANELS];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int p = 0; p < panels; p++) sum[r][p] = splat_int(fine ? 0 : offset[r]);
        sum_steps(rows, panels, x, block->stride, w, apart, from, to, sum);
        if (fine) {
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int p = 0; p < panels; p++)
                    EACH sum[r][p].part[k] = sum[r][p].part[k] * RADIX + offset[r];
            sum_steps(rows, panels, x + block->plane, block->stride, w, apart, from, to, sum);
        }
        UNROLL for (int p = 0; p < panels; p++) {
            Floats factor = load_bfloats(scale + p * scales_apart);
            UNROLL for (int r = 0; r < rows; r++) {
                Floats y = mul(to_floats(sum[r][p]), splat(own[r]));
                total[r][p] = fma_lanes(y, factor, total[r][p]);
            }
        }
        scale += PANEL, offset += block->padded, own += block->padded;
    }
}

// 4-bit weights, one panel: a step is eight numbers of a row, the first four in the low halves of
// the bytes. Zero points are subtracted with the sum of the row's numbers.
INLINE void sum_nibbles(int rows, const Target *t, int64_t row, int64_t channel,
                        Floats total[MOST_ROWS][MOST_PANELS]) {
    const Linear *linear = t->linear;
    const Block *block = t->x;
    const char *x = block->numbers + row * block->stride, *w = panel_of(linear, channel);
    int64_t groups = block->groups, steps = steps_of(INT4, linear->in), of_group = linear->group / 8;
    const uint16_t *scale = linear->scale + channel * groups;
    const uint8_t *zeros = linear->zeros + channel / PANEL * groups * 8;
    UNROLL for (int r = 0; r < rows; r++) total[r][0] = splat(0);
    for (int64_t g = 0; g < groups; g++) {
        int64_t to = least((g + 1) * of_group, steps);
        Ints sum[MOST_ROWS];
        UNROLL for (int r = 0; r < rows; r++) sum[r] = splat_int(0);
#if BYTE_MATRICES
        Blocks blocks[MOST_ROWS / 2];
        UNROLL for (int r = 0; r < rows; r += 2) blocks[r / 2] = no_blocks();
#endif
        UNROLL for (int64_t s = g * of_group; s < to; s++) {
            Ints both = load_bytes(w + s * STEP_BYTES);
            Ints low = and_int(both, 0x0f0f0f0f), high = and_int(right(both, 4), 0x0f0f0f0f);
            if (rows == 1) prefetch(w + s * STEP_BYTES + AHEAD);
#if BYTE_MATRICES
            UNROLL for (int r = 0; rows > 1 && r < rows; r += 2) {
                const char *numbers = x + r * block->stride + s * 8;
                vi pair = two_rows(numbers, numbers + block->stride);
                blocks[r / 2] = dot_blocks(blocks[r / 2], low, high, pair);
            }
            if (rows > 1) continue;
#endif
            UNROLL for (int r = 0; r < rows; r++) {
                const char *numbers = x + r * block->stride + s * 8;
                sum[r] = dot(sum[r], low, four_bytes(numbers));
                sum[r] = dot(sum[r], high, four_bytes(numbers + 4));
            }
        }
#if BYTE_MATRICES
        UNROLL for (int r = 0; rows > 1 && r < rows; r += 2)
            add_blocks(blocks[r / 2], &sum[r], &sum[r + 1]);
#endif
        Floats factor = load_bfloats(scale + g * PANEL);
        Floats zero = mul(factor, to_floats(load_nibbles(zeros + g * 8)));
        UNROLL for (int r = 0; r < rows; r++) {
            int64_t at = g * block->padded + row + r;
            Floats own = mul(to_floats(sum[r]), splat(block->scale[at]));
            total[r][0] = fma_lanes(own, factor, total[r][0]);
            total[r][0] = fma_lanes(splat(-block->weighed[at]), zero, total[r][0]);
        }
    }
}

#if BFLOAT_MATRICES
// sum_pairs for an even number of rows, two steps at a time: one half of a panel after the other,
// since eight rows by eight channels fill 16 registers, and each weight is arranged for all rows.
INLINE void sum_pair_blocks(int rows, int panels, const char *x, int64_t stride, const char *w,
                            int64_t apart, int64_t steps, Floats total[MOST_ROWS][MOST_PANELS]) {
    UNROLL for (int p = 0; p < panels; p++)
        UNROLL for (int half = 0; half < 2; half++) {
            const char *from = w + p * apart + half * (STEP_BYTES / 2);
            PairBlocks blocks[MOST_ROWS / 2];
            UNROLL for (int r = 0; r < rows; r += 2) blocks[r / 2] = no_pair_blocks();
            for (int64_t s = 0; s < steps; s += 2) {
                vi low[2], high[2] = {{0}, {0}};
                memcpy(low, from + s * STEP_BYTES, sizeof low);
                if (s + 1 < steps) memcpy(high, from + (s + 1) * STEP_BYTES, sizeof high);
                prefetch(from + s * STEP_BYTES + SOON);
                UNROLL for (int r = 0; r < rows; r += 2) {
                    const char *row = x + r * stride + s * 4;
                    vi both = two_rows(row, row + stride);
                    blocks[r / 2] = add_pair_blocks(blocks[r / 2], low, high, both);
                }
            }
            UNROLL for (int r = 0; r < rows; r += 2)
                put_pair_blocks(blocks[r / 2], half, &total[r][p], &total[r + 1][p]);
        }
}
#endif

#if PAIR_PRODUCTS
// bfloat16 weights: a step is two numbers of a row.
INLINE void sum_pairs(int rows, int panels, const char *x, int64_t stride, const char *w,
                      int64_t apart, int64_t steps, Floats total[MOST_ROWS][MOST_PANELS]) {
#if BFLOAT_MATRICES
    if (rows > 1) {
        sum_pair_blocks(rows, panels, x, stride, w, apart, steps, total);
        return;
    }
#endif
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < panels; p++) total[r][p] = splat(0);
    for (int64_t s = 0; s < steps; s++) {
        Ints weight[MOST_PANELS];
        UNROLL for (int p = 0; p < panels; p++) {
            const char *at = w + p * apart + s * STEP_BYTES;
            weight[p] = load_bytes(at);
            prefetch(at + (rows == 1 ? AHEAD : SOON));
        }
        UNROLL for (int r = 0; r < rows; r++) {
            vi numbers = four_bytes(x + r * stride + s * 4);
            UNROLL for (int p = 0; p < panels; p++)
                total[r][p] = add_pairs(total[r][p], weight[p], numbers);
        }
    }
}
#else
// One row of floats times panels of bfloat16 weights; a step is two numbers of the row. The order of
// summation is that of multiply_singles, so that a row's result does not depend on other rows.
INLINE void sum_widened(int panels, const float *x, const char *w, int64_t apart, int64_t steps,
                        Floats *total) {
    UNROLL for (int p = 0; p < panels; p++) total[p] = splat(0);
    for (int64_t s = 0; s < steps; s++) {
        Floats first = splat(x[2 * s]), second = splat(x[2 * s + 1]);
        UNROLL for (int p = 0; p < panels; p++) {
            Ints both = load_bytes(w + p * apart + s * STEP_BYTES);
            prefetch(w + p * apart + s * STEP_BYTES + AHEAD);
            total[p] = fma_lanes(first, from_bits(left(both, 16)), total[p]);
            total[p] = fma_lanes(second, from_bits(and_int(both, (int32_t)0xffff0000)), total[p]);
        }
    }
}

// Converts panels of bfloat16 weights to panels of floats with one number per step.
static void widen(const char *w, int64_t apart, int64_t steps, int64_t panels, float *to) {
    for (int64_t p = 0; p < panels; p++)
        for (int64_t s = 0; s < steps; s++, to += 2 * LANES) {
            Ints both = load_bytes(w + p * apart + s * STEP_BYTES);
            store(to, from_bits(left(both, 16)));
            store(to + LANES, from_bits(and_int(both, (int32_t)0xffff0000)));
        }
}
#endif

// Applies bias, activation and the finish to one panel's channels of some rows, and writes them to
// `out`. Compile-time constants at each use: whether all 16 channels exist, and the activation.
INLINE void put_panel(int whole, int64_t activation, const Target *t, int64_t rows, int64_t row,
                      int64_t channel, const float *sums, int64_t apart) {
    const Finish *finish = t->finish;
    const float *bias = t->linear->bias, *times = finish->times, *plus = finish->plus;
    int64_t count = whole ? LANES : t->linear->out - channel, at = channel - t->from;
    int64_t beside = row * finish->stride + at;
    float *out = t->out + row * t->stride + at;
    Floats added = bias ? load_some(bias + channel, count) : splat(0);
    for (int64_t r = 0; r < rows; r++, out += t->stride, beside += finish->stride) {
        Floats y = activate_lanes(activation, add(load(sums + r * apart), added));
        if (times) y = mul(y, load_some(times + beside, count));
        if (plus) y = add(y, load_some(plus + beside, count));
        store_some(out, y, count);
    }
}

// One function for all tiles, to keep their code small.
__attribute__((noinline)) void put_tile(const Target *t, int64_t rows, int64_t panels, int64_t row,
                                        int64_t channel, const float *sums) {
    int64_t activation = t->finish->activation, apart = panels * LANES;
    rows = least(rows, t->x->rows - row);
    for (int64_t p = 0; p < panels; p++, channel += PANEL, sums += LANES) {
        if (t->linear->out - channel < LANES)
            put_panel(0, activation, t, rows, row, channel, sums, apart);
        else if (activation == NONE)
            put_panel(1, NONE, t, rows, row, channel, sums, apart);
        else if (activation == SILU)
            put_panel(1, SILU, t, rows, row, channel, sums, apart);
        else if (activation == GELU_TANH)
            put_panel(1, GELU_TANH, t, rows, row, channel, sums, apart);
        else
            put_panel(1, activation, t, rows, row, channel, sums, apart);
    }
}

#define PUT(ROWS, PANELS)                                                                       \
    float sums[ROWS * PANELS * LANES] __attribute__((aligned(64)));                             \
    UNROLL for (int r = 0; r < ROWS; r++)                                                       \
        UNROLL for (int p = 0; p < PANELS; p++)                                                 \
            store(sums + (r * PANELS + p) * LANES, total[r][p]);                                \
    put_tile(t, ROWS, PANELS, row, channel, sums);
#define BYTES(NAME, FINE, ROWS, PANELS)                                                         \
    static void NAME##_##ROWS##_##PANELS(const Target *t, int64_t row, int64_t channel) {       \
        Floats total[MOST_ROWS][MOST_PANELS];                                                   \
        sum_bytes(FINE, ROWS, PANELS, t, row, channel, total);                                  \
        PUT(ROWS, PANELS)                                                                       \
    }
#define NIBBLES(ROWS)                                                                           \
    static void nibbles_##ROWS(const Target *t, int64_t row, int64_t channel) {                 \
        Floats total[MOST_ROWS][MOST_PANELS];                                                   \
        sum_nibbles(ROWS, t, row, channel, total);                                              \
        PUT(ROWS, 1)                                                                            \
    }
#if PAIR_PRODUCTS
#define PAIRS(ROWS, PANELS)                                                                     \
    static void pairs_##ROWS##_##PANELS(const Target *t, int64_t row, int64_t channel) {        \
        Floats total[MOST_ROWS][MOST_PANELS];                                                   \
        int64_t steps = steps_of(BFLOAT16, t->linear->in);                                      \
        sum_pairs(ROWS, PANELS, t->x->numbers + row * t->x->stride, t->x->stride,               \
                  panel_of(t->linear, channel), steps * STEP_BYTES, steps, total);              \
        PUT(ROWS, PANELS)                                                                       \
    }
#else
// A block of one row, two panels at a time: two independent sums hide the latency of an addition.
static void multiply_one_row(const Target *t, int64_t to) {
    int64_t steps = steps_of(BFLOAT16, t->linear->in), end = (to + PANEL - 1) / PANEL, panels;
    const float *x = (const float *)t->x->numbers;
    for (int64_t panel = t->from / PANEL; panel < end; panel += panels) {
        const char *w = panel_of(t->linear, panel * PANEL);
        float sums[2 * LANES] __attribute__((aligned(64)));
        Floats total[2];
        panels = least(2, end - panel);
        if (panels == 2)
            sum_widened(2, x, w, steps * STEP_BYTES, steps, total);
        else
            sum_widened(1, x, w, steps * STEP_BYTES, steps, total);
        for (int64_t p = 0; p < panels; p++) store(sums + p * LANES, total[p]);
        put_tile(t, 1, panels, 0, panel * PANEL, sums);
    }
}

// All rows of a block; each panel is converted once.
static void multiply_widened(const Target *t, int64_t to) {
    const Block *x = t->x;
    int64_t steps = steps_of(BFLOAT16, t->linear->in), stride = x->stride / 4;
    int64_t end = (to + PANEL - 1) / PANEL, panels;
    for (int64_t panel = t->from / PANEL; panel < end; panel += panels) {
        panels = least(FLOAT_PANELS, end - panel);
        widen(panel_of(t->linear, panel * PANEL), steps * STEP_BYTES, steps, panels, x->widened);
        for (int64_t row = 0; row < x->rows; row += FLOAT_ROWS) {
            float sums[FLOAT_ROWS * FLOAT_PANELS * LANES] __attribute__((aligned(64)));
            multiply_singles((const float *)x->numbers + row * stride, stride, x->widened,
                             steps * 2 * LANES, t->linear->in, FLOAT_ROWS, panels, sums,
                             panels * LANES);
            put_tile(t, FLOAT_ROWS, panels, row, panel * PANEL, sums);
        }
    }
}
#endif
typedef void Tile(const Target *, int64_t row, int64_t channel);

// By kind of weight: for one row, then for many and one, two and three panels.
BYTES(bytes, 0, 1, 1) BYTES(fine, 1, 1, 1) NIBBLES(1)
#if PAIR_PRODUCTS && PAIR_PANELS == 3
PAIRS(1, 1) PAIRS(8, 1) PAIRS(8, 2) PAIRS(8, 3)
static Tile *const PAIR_TILES[] = {pairs_1_1, pairs_8_1, pairs_8_2, pairs_8_3};
#elif PAIR_PRODUCTS
PAIRS(1, 1) PAIRS(8, 1)
static Tile *const PAIR_TILES[] = {pairs_1_1, pairs_8_1};
#endif
#if defined(VECTOR_512)
BYTES(bytes, 0, 8, 1) BYTES(bytes, 0, 8, 2) BYTES(bytes, 0, 8, 3) BYTES(fine, 1, 8, 1) NIBBLES(8)
static Tile *const INT8_TILES[] = {bytes_1_1, bytes_8_1, bytes_8_2, bytes_8_3};
static Tile *const FINE_TILES[] = {fine_1_1, fine_8_1};
static Tile *const INT4_TILES[] = {nibbles_1, nibbles_8};
#elif defined(VECTOR_256) || BYTE_MATRICES
BYTES(bytes, 0, 4, 1) BYTES(fine, 1, 4, 1) NIBBLES(4)
static Tile *const INT8_TILES[] = {bytes_1_1, bytes_4_1};
static Tile *const FINE_TILES[] = {fine_1_1, fine_4_1};
static Tile *const INT4_TILES[] = {nibbles_1, nibbles_4};
#else
BYTES(bytes, 0, 2, 1) BYTES(fine, 1, 2, 1) NIBBLES(2)
static Tile *const INT8_TILES[] = {bytes_1_1, bytes_2_1};
static Tile *const FINE_TILES[] = {fine_1_1, fine_2_1};
static Tile *const INT4_TILES[] = {nibbles_1, nibbles_2};
#endif

// The number of panels to take next, avoiding a last tile with a single panel if possible.
INLINE int next_panels(int most, int64_t left) {
    if (most < 3 || left == 1) return (int)least(most, left);
    return left == 4 || left == 2 ? 2 : 3;
}

// Computes channels from .. to (whole panels, or up to the last) of a layer for every row of a
// block, finishes them and writes them to `out`, which like the finish begins with channel `from`.
void multiply_block(const Linear *linear, const Block *x, int64_t from, int64_t to,
                    const Finish *finish, float *out, int64_t stride) {
    const Target target = {linear, x, finish, out, from, stride};
    // A share may be empty; its first panel would then be another thread's last one.
    if (from >= to) return;
    if (linear->kind == FLOAT32) {
        multiply_lanes(&target, to);
        return;
    }
    Tile *const *tiles = linear->fine ? FINE_TILES : INT8_TILES;
    int64_t high = INT8_ROWS;
    int most = linear->fine ? 1 : INT8_PANELS;
    if (linear->kind == INT4)
        tiles = INT4_TILES, high = INT4_ROWS, most = 1;  // wider tiles would spill registers
    if (linear->kind == BFLOAT16) {
#if PAIR_PRODUCTS
        tiles = PAIR_TILES, high = PAIR_ROWS, most = PAIR_PANELS;
#else
        if (x->rows == 1)
            multiply_one_row(&target, to);
        else
            multiply_widened(&target, to);
        return;
#endif
    }
    int64_t end = (to + PANEL - 1) / PANEL;
    for (int64_t panel = from / PANEL; panel < end;) {
        int count = x->rows == 1 ? 1 : next_panels(most, end - panel);
        for (int64_t row = 0; row < x->rows; row += high)
            tiles[x->rows == 1 ? 0 : count](&target, row, panel * PANEL);
        panel += count;
    }
}

#if PAIR_PRODUCTS
// Rows (a multiple of PAIR_ROWS) of bfloat16 pairs times panels, for attention: out (rows, panels ·
// 16), `wide` floats apart.
#define PRODUCT(PANELS)                                                                         \
    static void product_##PANELS(const char *x, int64_t stride, const char *w, int64_t apart,   \
                                 int64_t steps, float *out, int64_t wide) {                     \
        Floats total[MOST_ROWS][MOST_PANELS];                                                   \
        sum_pairs(PAIR_ROWS, PANELS, x, stride, w, apart, steps, total);                        \
        UNROLL for (int r = 0; r < PAIR_ROWS; r++)                                              \
            UNROLL for (int p = 0; p < PANELS; p++)                                             \
                store(out + r * wide + p * PANEL, total[r][p]);                                 \
    }
typedef void Product(const char *, int64_t, const char *, int64_t, int64_t, float *, int64_t);
PRODUCT(1)
#if PAIR_PANELS == 3
PRODUCT(2) PRODUCT(3)
static Product *const PRODUCTS[] = {product_1, product_2, product_3};
#else
static Product *const PRODUCTS[] = {product_1};
#endif

void multiply_pairs(const char *x, int64_t stride, const char *w, int64_t apart, int64_t steps,
                    int64_t rows, int64_t panels, float *out, int64_t wide) {
    for (int64_t panel = 0; panel < panels;) {
        int count = next_panels(PAIR_PANELS, panels - panel);
        for (int64_t row = 0; row < rows; row += PAIR_ROWS)
            PRODUCTS[count - 1](x + row * stride, stride, w + panel * apart, apart, steps,
                                out + row * wide + panel * PANEL, wide);
        panel += count;
    }
}
#endif
