// Both towers' layers over many rows, and one token through the whole decoder.
//
// Compiled on the user's machine for its own processor (see compiling.py), called by ctypes
// (library.py). A linear layer's weight is (out, in), one output channel after the other, as
// safetensors files hold it; or, on processors with AVX-512, laid out anew as panels of 16 channels
// (panels.c). The arithmetic is that of smolstack/model/quantised.py: sums of integers, the same on
// every processor.
#ifndef SMOLSTACK_H
#define SMOLSTACK_H

#include <stdint.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#define GROUP 32   // int4: input channels that share a scale
#define CHUNK 128  // positions that one part of attention looks at

enum { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };              // kinds of weights
enum { CACHE_FLOAT32 = 0, CACHE_FLOAT16 = 1, CACHE_BFLOAT16 = 2 };    // kinds of keys and values
enum { NONE = 0, RELU = 1, SILU = 2, GELU = 3, GELU_TANH = 4 };      // activations

// y = x · weightᵀ + bias.
typedef struct {
    int64_t kind, in, out;
    int64_t panels;       // whether weight and INT4's scale are laid out as panels
    const void *weight;   // INT4: two channels a byte, channel j of a group of 32 beside j + 16
    const void *scale;    // INT8: float (out); INT4: float16 (out, in / GROUP)
    const int32_t *sums;  // INT8 in rows: the sum of each row's weights
    const float *bias;    // (out) or NULL
} Linear;

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

// Where a sequence stands: tokens held, room for them, and the first one that may be seen.
typedef struct {
    int64_t past, capacity, first;
} Place;

// A layer of the vision tower, and the tower between patch embedding and last norm.
typedef struct {
    Norm attention_norm, mlp_norm;
    Linear query, key, value, out, up, down;
} EncoderLayer;

typedef struct {
    int64_t layers, hidden, heads, activation;
    const EncoderLayer *layer;
} Encoder;

// Queries of one sequence over its keys and values. Strides count numbers, not bytes; keys and
// values of a kind lie key_stride apart from row to row and head_stride from head to head.
typedef struct {
    int64_t rows, heads, kv_heads, width;
    int64_t keys, causal;  // the last `rows` keys are the queries' own
    int64_t kind, key_stride, head_stride, query_stride;
    const float *query;    // (rows, heads · width), query_stride apart
    const void *key, *value;
    float *out;            // (rows, heads · width)
} Attention;

// Activations as the kernels read them: one block of rows, each row `stride` numbers long.
typedef struct {
    int64_t kind, rows, in, stride;
    const float *floats;  // FLOAT32, BFLOAT16: the rows as they are
    void *numbers;        // INT8: int16, or uint8 with 128 added (VNNI); INT4: int8
    int32_t *offsets;     // INT4: (rows, groups, 8), what the zero point 8 adds up to
    float *scale;         // (rows)
} Rows;

// The same for weights in panels.
typedef struct {
    int64_t rows, stride;  // bytes between rows
    char *numbers;         // int8 or bfloat16
    float *scale, *normed;
    int32_t *sums;         // INT8: (rows); INT4: (rows, groups), what the zero point adds up to
} Block;

// What is done to a sum on its way out: activation(sum) · times + plus.
typedef struct {
    int64_t activation;
    const float *times, *plus;  // (rows, stride) or NULL
    int64_t stride;
} Finish;

int64_t rows_bytes(int64_t rows, int64_t in);
void lay_out_rows(Rows *to, void *memory, int64_t rows, int64_t in);
void prepare_rows(Rows *to, int64_t kind, const float *x, int64_t stride);
void multiply(const Linear *linear, const Rows *x, int64_t from, int64_t to, float *out,
              int64_t stride);
int64_t block_bytes(int64_t rows, int64_t in);
void lay_out_block(Block *block, void *memory, int64_t rows, int64_t in);
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

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

#endif
