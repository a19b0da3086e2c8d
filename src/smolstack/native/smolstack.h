// Both towers' layers over many rows, and one token through the whole decoder.
//
// Compiled once for each instruction set of instruction_sets.txt (CMakeLists.txt), or at first use for the
// current processor (compiling.py); called through ctypes (library.py). A float32 weight is (out,
// in) as in safetensors files; those of other kinds are packed as panels of 16 channels (panels.c).
// Integer arithmetic is that of smolstack/model/quantized.py: integer sums per group, the same on
// every processor.
#ifndef SMOLSTACK_H
#define SMOLSTACK_H

#include <stdint.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

// Increment with every change of an exported function's arguments or their meaning, here and in
// library.py; the sizes of structures are compared as well.
#define ABI_VERSION 1

#define CHUNK 128  // positions per part of attention
// Limits that Python checks (backends/cpu/decoder.py): channels of a head, and of all query heads
// that share a key.
#define MOST_WIDTH 512
#define MOST_QUERIES 16384

enum { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };              // kinds of weights
enum { CACHE_FLOAT32 = 0, CACHE_FLOAT16 = 1, CACHE_BFLOAT16 = 2 };    // kinds of keys and values
enum { NONE = 0, RELU = 1, SILU = 2, GELU = 3, GELU_TANH = 4 };      // activations

// y = x · weightᵀ + bias. Integers share a scale per `group` adjacent input channels (the last
// group may be shorter), as do the activations that they are multiplied by:
//   INT8: weight = q · scale, q from -127 to 127
//   INT4: weight = (q - zero) · scale, q and zero from 0 to 15
typedef struct {
    int64_t kind, in, out;
    int64_t group, fine;    // fine: activations of 16 bits in place of 8
    const void *weight;     // FLOAT32: (out, in); the others: panels
    const uint16_t *scale;  // bfloat16, (groups, 16) for every panel
    const uint8_t *zeros;   // INT4: (groups, 8) for every panel, two channels to a byte
    const float *bias;      // (out) or NULL
} Linear;

// A weight as a checkpoint stores it: weight[o][i] · by_out[o] · by_in[i].
enum { STORED_FLOAT32 = 0, STORED_BFLOAT16 = 1, STORED_FLOAT16 = 2 };
typedef struct {
    int64_t kind, in, out;
    const void *weight;             // (out, in)
    const float *by_out, *by_in;    // (out), (in), or NULL: all 1
} Stored;

enum { NO_NORM = 0, LAYER_NORM = 1, RMS_NORM = 2 };

typedef struct {
    int64_t kind;
    double eps;
    const float *weight, *bias;  // (in); RMS_NORM has no bias
} Norm;

typedef struct {
    const float *attention_norm, *mlp_norm;
    Linear query, key, value, out, gate, up, down;
} Layer;

typedef struct {
    int64_t layers, hidden, intermediate, heads, kv_heads, head_dim;
    int64_t activation, cache;
    double norm_eps;
    const float *frequencies;  // (head_dim / 2), radians per position
    const float *norm;
    const Layer *layer;
    Linear head;
} Decoder;

// A sequence's KV cache: number of tokens, capacity, and the first token that is not padding.
typedef struct {
    int64_t past, capacity, first;
} CacheSlot;

// A layer of the vision tower, and the tower between patch embedding and last norm.
typedef struct {
    Norm attention_norm, mlp_norm;
    Linear query, key, value, out, up, down;
} EncoderLayer;

typedef struct {
    int64_t layers, hidden, heads, activation;
    const EncoderLayer *layer;
} Encoder;

// Queries of one sequence over its keys and values. Strides are in numbers, not bytes; keys and
// values have stride key_stride between rows and head_stride between heads.
typedef struct {
    int64_t rows, heads, kv_heads, width;
    int64_t keys, causal;  // the last `rows` keys belong to the queries' tokens
    int64_t exact;         // products in float32; otherwise in bfloat16 pairs if that is faster
    int64_t kind, key_stride, head_stride, query_stride;
    const float *query;    // (rows, heads · width), query_stride apart
    const void *key, *value;
    float *out;            // (rows, heads · width)
} Attention;

// Rows in the kernels' input format: integers of 8 bits (fine: of 16, as two planes that represent
// RADIX · first + second), bfloat16, or float32.
#define RADIX 254
typedef struct {
    int64_t rows, padded;   // padded: to whole tiles
    int64_t stride, plane;  // bytes from row to row, and from a row's first plane to its second
    int64_t groups;         // of a row
    char *numbers;
    float *scale;     // (groups, padded)
    float *weighed;   // (groups, padded): the sum of a group's integers times its scale
    int32_t *offset;  // (groups, padded): what WEIGHT_OFFSET adds to a group's product, negative
    float *normed;    // (16, in): rows after their norm
    float *widened;   // bfloat16 panels as floats, where there are no bfloat16 products
} Block;

// The epilogue applied to a sum: activation(sum) · times + plus.
typedef struct {
    int64_t activation;
    const float *times, *plus;  // (rows, stride) or NULL
    int64_t stride;
} Finish;

void multiply_floats(const Linear *linear, const float *x, int64_t rows, int64_t x_stride,
                     int64_t from, int64_t to, float *out, int64_t stride);
int64_t block_bytes(int64_t rows, int64_t in);
void lay_out_block(Block *block, void *memory, int64_t rows, int64_t in);
int reads_alike(const Linear *a, const Linear *b);
void prepare_block(Block *block, const Linear *linear, const Norm *norm, const float *x,
                   int64_t stride);
void multiply_block(const Linear *linear, const Block *x, int64_t from, int64_t to,
                    const Finish *finish, float *out, int64_t stride);
int dense_rows(const Linear *linear, const Norm *norm, const float *x, int64_t rows,
               int64_t activation, const float *plus, float *out, int threads);
int mixed_rows(const Norm *norm, const Linear *query, const Linear *key, const Linear *value,
               const float *x, int64_t rows, float *out, int threads);
int mlp_rows(const Norm *norm, const Linear *gate, const Linear *up, const Linear *down,
             int64_t activation, float *x, int64_t rows, int threads);
int attend_rows(const Attention *a, int threads);
void activate(int64_t activation, float *x, int64_t count);
void attend(const Decoder *d, int64_t count, int64_t from, const float *query, const void *keys,
            const void *values, float *partial);
void join(int64_t width, int64_t parts, const float *partial, int64_t apart, float *out);
void rotate(int64_t width, const float *turns, float *x);
void write_cache(const Decoder *d, void *cache, int64_t at, const float *x);

void stored_row(const Stored *s, int64_t o, int64_t from, int64_t count, float *out);
void fill_group(int64_t kind, int64_t in, int64_t out, int64_t group, void *memory, int64_t panel,
                int64_t g, const uint8_t *numbers, const uint16_t *scale, const uint8_t *zero);

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

#endif
