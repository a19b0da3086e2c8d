// The decoder's linear layers, and one token through the whole decoder, at the speed of memory.
//
// Compiled on the user's machine for its own processor (see compile.py), called by ctypes
// (library.py). All matrices are row-major: a linear layer's weight is (out, in), one output
// channel after the other, exactly as safetensors files hold it, so that weights stay
// memory-mapped. The arithmetic is that of smolstack/model/quantised.py: sums of integers, the
// same on every processor.
#ifndef SMOLSTACK_H
#define SMOLSTACK_H

#include <stdint.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#define GROUP 32   // int4: input channels that share a scale
#define CHUNK 128  // positions that one part of attention looks at

enum { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };              // kinds of weights
enum { CACHE_FLOAT32 = 0, CACHE_FLOAT16 = 1 };                       // kinds of keys and values
enum { NONE = 0, RELU = 1, SILU = 2, GELU = 3, GELU_TANH = 4 };      // activations

// y = x · weightᵀ + bias.
typedef struct {
    int64_t kind, in, out;
    const void *weight;   // INT4: two channels a byte, channel j of a group of 32 beside j + 16
    const void *scale;    // INT8: float (out); INT4: float16 (out, in / GROUP)
    const int32_t *sums;  // INT8: the sum of each row's weights
    const float *bias;    // (out) or NULL
} Linear;

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

// Activations as the kernels read them: one block of rows, each row `stride` numbers long.
typedef struct {
    int64_t kind, rows, in, stride;
    const float *floats;  // FLOAT32, BFLOAT16: the rows as they are
    void *numbers;        // INT8: int16, or uint8 with 128 added (VNNI); INT4: int8
    int32_t *offsets;     // INT4: (rows, groups, 8), what the zero point 8 adds up to
    float *scale;         // (rows)
} Rows;

int64_t rows_bytes(int64_t rows, int64_t in);
void lay_out_rows(Rows *to, void *memory, int64_t rows, int64_t in);
void prepare_rows(Rows *to, int64_t kind, const float *x, int64_t stride);
void multiply(const Linear *linear, const Rows *x, int64_t from, int64_t to, float *out,
              int64_t stride);
void activate(int64_t activation, float *x, int64_t count);
void attend(const Decoder *d, int64_t count, int64_t from, const float *query, const void *keys,
            const void *values, float *partial);
void join(int64_t width, int64_t parts, const float *partial, int64_t apart, float *out);
void rotate(int64_t width, const float *turns, float *x);
void write_cache(const Decoder *d, void *cache, int64_t at, const float *x);

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

#endif
