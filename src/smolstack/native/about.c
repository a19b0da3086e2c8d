// Properties of a library: the layout of its structures, the sources it was compiled from, and its
// instruction set. library.py checks them before it calls anything else.
#include "vector_products.h"

#if !defined(SMOLSTACK_SOURCES)
#define SMOLSTACK_SOURCES ""
#endif

int64_t abi_version(void) { return ABI_VERSION; }

// SHA-256 of the sources, in hexadecimal; empty if they were compiled at first use.
const char *sources(void) { return SMOLSTACK_SOURCES; }

// Sizes of the structures shared with Python, in library.py's order; 0 after the last one.
int64_t struct_bytes(int64_t which) {
    static const int64_t BYTES[] = {sizeof(Linear), sizeof(Stored),  sizeof(Norm),
                                    sizeof(EncoderLayer), sizeof(Encoder), sizeof(Layer),
                                    sizeof(Decoder), sizeof(CacheSlot)};
    return which >= 0 && which < (int64_t)(sizeof BYTES / sizeof *BYTES) ? BYTES[which] : 0;
}

// 0 plain C, 1 AVX2, 2 AVX2 with VNNI, 3 AVX-512 with VNNI, 4 also with bfloat16 products, 5 NEON,
// 6 NEON with dot products of bytes, 7 also with products of matrices of bytes, 8 and of bfloat16.
int instructions(void) {
#if defined(VECTOR_512) && defined(__AVX512BF16__)
    return 4;
#elif defined(VECTOR_512)
    return 3;
#elif defined(VECTOR_VNNI)
    return 2;
#elif defined(VECTOR_256)
    return 1;
#elif BYTE_MATRICES && BFLOAT_MATRICES
    return 8;
#elif BYTE_MATRICES
    return 7;
#elif defined(__ARM_FEATURE_DOTPROD)
    return 6;
#elif defined(__aarch64__)
    return 5;
#else
    return 0;
#endif
}
