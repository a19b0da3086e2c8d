// What the files of products share: where a tile of sums goes, and how many are summed at once.
#ifndef SMOLSTACK_PRODUCT_H
#define SMOLSTACK_PRODUCT_H

#include "smolstack.h"

#include "vector_products.h"

#define PANEL 16  // output channels of a panel

// Rows and vectors of floats that are summed in registers at once.
#if defined(VECTOR_512)
#define FLOAT_ROWS 8
#define FLOAT_PANELS 3
#elif defined(VECTOR_256) || defined(__aarch64__)
#define FLOAT_ROWS 4
#define FLOAT_PANELS 1
#else
#define FLOAT_ROWS 2
#define FLOAT_PANELS 1
#endif

// Where a product goes: row and channel of `out`, which begins with channel `from`.
typedef struct {
    const Linear *linear;
    const Block *x;
    const Finish *finish;
    float *out;
    int64_t from, stride;
} Target;

// The sums of a tile, (rows, panels · 16), finished.
void put_tile(const Target *t, int64_t rows, int64_t panels, int64_t row, int64_t channel,
              const float *sums);

// Rows of x, laid out for multiply_lanes: panels of 16 rows, number by number.
void prepare_lanes(Block *block, int64_t in, int64_t row, const float *x, int64_t stride);

// FLOAT32 weights times a block of prepare_lanes, channels from t->from .. to.
void multiply_lanes(const Target *t, int64_t to);

// Rows of floats (a multiple of FLOAT_ROWS), `stride` floats apart, times panels of floats, `apart`
// floats apart, a step being one number: out (rows, panels · 16), `wide` floats apart.
void multiply_singles(const float *x, int64_t stride, const float *w, int64_t apart, int64_t steps,
                      int64_t rows, int64_t panels, float *out, int64_t wide);

#if PAIR_PRODUCTS
// The same with bfloat16 numbers, a step being two of them; `stride` and `apart` count bytes, rows
// are a multiple of 8.
void multiply_pairs(const char *x, int64_t stride, const char *w, int64_t apart, int64_t steps,
                    int64_t rows, int64_t panels, float *out, int64_t wide);
#endif

#endif
