// Linear layers and MLPs over many rows, fused with the norm before and the residual sum after
// them, so that a block of rows stays in a core's cache throughout.
#include "smolstack.h"

#include <stdlib.h>
#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif


#define BLOCK_ROWS 64   // a whole number of tiles: see INT8_ROWS and its kin
#define FLOAT_BLOCK 48  // the same where the rows are the lanes, see FLOAT_PANELS

// Requests huge pages for memory that will be read repeatedly: decoding a token reads all weights,
// and thus touches every page once.
void want_large_pages(void *memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    uintptr_t size = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t from = ((uintptr_t)memory + size - 1) / size * size;
    uintptr_t to = ((uintptr_t)memory + (uintptr_t)bytes) / size * size;
    if (to > from) madvise((void *)from, to - from, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

#if defined(__linux__) && defined(MADV_PAGEOUT)
// Whether a range has no private pages, so that all of it is backed by a file, according to
// /proc/self/pagemap (bit 61: a file's page, bit 63: present, bit 62: swapped, which only own pages
// are).
static int files_alone(uintptr_t from, uintptr_t to, uintptr_t size) {
    uint64_t some[1024];
    int file = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC), alone = file >= 0, found = 0;
    for (uintptr_t page = from / size; alone && page < to / size;) {
        size_t count = (size_t)least(1024, (int64_t)(to / size - page));
        ssize_t got = pread(file, some, count * 8, (off_t)page * 8);
        if (got != (ssize_t)(count * 8)) alone = 0;
        for (size_t i = 0; alone && i < count; i++) {
            int present = some[i] >> 63 & 1, of_file = some[i] >> 61 & 1;
            found |= present;
            alone = !(some[i] >> 62 & 1) && (!present || of_file);
        }
        page += count;
    }
    if (file >= 0) close(file);
    return alone && found;
}
#endif

// Releases pages of a mapped file, which are read again from the page cache if needed.
// Memory that is not backed by a file is not changed.
void release_pages(const void *memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_PAGEOUT)
    uintptr_t size = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t from = ((uintptr_t)memory + size - 1) / size * size;
    uintptr_t to = ((uintptr_t)memory + (uintptr_t)bytes) / size * size;
    if (to > from && files_alone(from, to, size)) madvise((void *)from, to - from, MADV_DONTNEED);
#else
    (void)memory, (void)bytes;
#endif
}

static int64_t rows_of_block(const Linear *linear, int64_t rows, int threads) {
    int floats = linear->kind == FLOAT32;
    int64_t share = rounded_up((rows + threads - 1) / threads, floats ? 16 : 8);
    return least(floats ? FLOAT_BLOCK : BLOCK_ROWS, share);
}

static int this_thread(void) {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// out = activation(norm(x) · weightᵀ + bias) + plus: x (rows, in); out, and plus unless it is NULL,
// (rows, out). Returns 1 when memory runs out, else 0.
int dense_rows(const Linear *linear, const Norm *norm, const float *x, int64_t rows,
               int64_t activation, const float *plus, float *out, int threads) {
    int64_t some = rows_of_block(linear, rows, threads);
    int64_t bytes = block_bytes(some, linear->in);
    char *memory = malloc((size_t)(bytes * threads));
    if (!memory) return 1;
    if (rows <= some) {  // one block, as for the logits of one token: the threads share the channels
        int64_t share = rounded_up((linear->out + threads - 1) / threads, 16);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int64_t from = 0; from < linear->out; from += share) {
            Block block;
            Finish finish = {activation, NULL, plus ? plus + from : NULL, linear->out};
            lay_out_block(&block, memory + this_thread() * bytes, rows, linear->in);
            prepare_block(&block, linear, norm, x, linear->in);
            multiply_block(linear, &block, from, least(from + share, linear->out), &finish,
                           out + from, linear->out);
        }
        free(memory);
        return 0;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t first = 0; first < rows; first += some) {
        Block block;
        int64_t at = first * linear->out;
        Finish finish = {activation, NULL, plus ? plus + at : NULL, linear->out};
        lay_out_block(&block, memory + this_thread() * bytes, least(some, rows - first),
                      linear->in);
        prepare_block(&block, linear, norm, x + first * linear->in, linear->in);
        multiply_block(linear, &block, 0, linear->out, &finish, out + at, linear->out);
    }
    free(memory);
    return 0;
}

// Queries, keys and values, concatenated: out (rows, q + k + v channels).
int mixed_rows(const Norm *norm, const Linear *query, const Linear *key, const Linear *value,
               const float *x, int64_t rows, float *out, int threads) {
    const Linear *parts[3] = {query, key, value};
    int64_t some = rows_of_block(query, rows, threads);
    int64_t bytes = block_bytes(some, query->in);
    int64_t stride = query->out + key->out + value->out;
    char *memory = malloc((size_t)(bytes * threads));
    if (!memory) return 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t first = 0; first < rows; first += some) {
        const Finish finish = {NONE, NULL, NULL, 0};
        Block block;
        float *to = out + first * stride;
        lay_out_block(&block, memory + this_thread() * bytes, least(some, rows - first), query->in);
        for (int i = 0; i < 3; i++) {
            if (i == 0 || !reads_alike(parts[i], parts[i - 1]))
                prepare_block(&block, parts[i], norm, x + first * query->in, query->in);
            multiply_block(parts[i], &block, 0, parts[i]->out, &finish, to, stride);
            to += parts[i]->out;
        }
    }
    free(memory);
    return 0;
}

// x += down(activation(gate(norm(x))) · up(norm(x))), or without a gate down(activation(up(…))).
int mlp_rows(const Norm *norm, const Linear *gate, const Linear *up, const Linear *down,
             int64_t activation, float *x, int64_t rows, int threads) {
    const Norm none = {NO_NORM, 0, NULL, NULL};
    int64_t some = rows_of_block(up, rows, threads), inner = up->out, hidden = up->in;
    int64_t widest = inner > hidden ? inner : hidden;
    int64_t scratch = rounded_up(some * inner * 4, 64);
    int64_t bytes = rounded_up(block_bytes(some, widest), 64) + scratch;
    char *memory = malloc((size_t)(bytes * threads + 64));
    if (!memory) return 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t first = 0; first < rows; first += some) {
        char *own = (char *)rounded_up((int64_t)(intptr_t)memory, 64) + this_thread() * bytes;
        float *between = (float *)own, *states = x + first * hidden;
        Block block;
        Finish plain = {gate ? NONE : activation, NULL, NULL, inner};
        Finish gated = {activation, between, NULL, inner}, added = {NONE, NULL, states, hidden};
        lay_out_block(&block, own + scratch, least(some, rows - first), widest);
        prepare_block(&block, up, norm, states, hidden);
        multiply_block(up, &block, 0, inner, &plain, between, inner);
        if (gate && !reads_alike(gate, up)) prepare_block(&block, gate, norm, states, hidden);
        if (gate) multiply_block(gate, &block, 0, inner, &gated, between, inner);
        prepare_block(&block, down, &none, between, inner);
        multiply_block(down, &block, 0, hidden, &added, states, hidden);
    }
    free(memory);
    return 0;
}
