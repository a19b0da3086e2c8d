// Features of this processor and operating system, for choosing among the kernel libraries.
// Compiled for the architecture's baseline processor.
#include <stdint.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(__APPLE__)
#include <sys/sysctl.h>
static int said(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, 0, 0) == 0 && value;
}
#endif

#if defined(__x86_64__)
#include <cpuid.h>

typedef struct { const char *name; unsigned leaf, sub, reg, bit, state; } Feature;

// A register's bit of a leaf of CPUID (registers: 0 eax, 1 ebx, 2 ecx, 3 edx), and the state that
// the system must keep when it switches threads: 6 that of AVX, 0xe6 that of AVX-512.
static const Feature FEATURES[] = {
    {"fma", 1, 0, 2, 12, 6},           {"movbe", 1, 0, 2, 22, 0},
    {"f16c", 1, 0, 2, 29, 6},          {"avx2", 7, 0, 1, 5, 6},
    {"bmi1", 7, 0, 1, 3, 0},           {"bmi2", 7, 0, 1, 8, 0},
    {"avx512f", 7, 0, 1, 16, 0xe6},    {"avx512dq", 7, 0, 1, 17, 0xe6},
    {"avx512cd", 7, 0, 1, 28, 0xe6},   {"avx512bw", 7, 0, 1, 30, 0xe6},
    {"avx512vl", 7, 0, 1, 31, 0xe6},   {"avx512_vnni", 7, 0, 2, 11, 0xe6},
    {"avx_vnni", 7, 1, 0, 4, 6},       {"avx512_bf16", 7, 1, 0, 5, 0xe6},
};

static uint64_t kept_state(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;  // no XGETBV
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    uint64_t state = (uint64_t)high << 32 | low;
#if defined(__APPLE__)  // saves AVX-512 state only after a program's first use of it
    if (said("hw.optional.avx512f")) state |= 0xe0;
#endif
    return state;
}

static int has(const Feature *feature) {
    unsigned r[4];
    if (!__get_cpuid_count(feature->leaf, 0, r, r + 1, r + 2, r + 3)) return 0;
    if (feature->sub && r[0] < feature->sub) return 0;  // leaf 7 returns its highest sub-leaf in eax
    if (!__get_cpuid_count(feature->leaf, feature->sub, r, r + 1, r + 2, r + 3)) return 0;
    return r[feature->reg] >> feature->bit & 1 && (kept_state() & feature->state) == feature->state;
}

#elif defined(__aarch64__)

typedef struct { const char *name; int word; unsigned bit; const char *apple; } Feature;

static const Feature FEATURES[] = {  // bits of Linux's AT_HWCAP and AT_HWCAP2
    {"asimd", 0, 1, "hw.optional.AdvSIMD"},
    {"atomics", 0, 8, "hw.optional.arm.FEAT_LSE"},
    {"asimdhp", 0, 10, "hw.optional.arm.FEAT_FP16"},
    {"asimdrdm", 0, 12, "hw.optional.arm.FEAT_RDM"},
    {"asimddp", 0, 20, "hw.optional.arm.FEAT_DotProd"},
    {"i8mm", 1, 13, "hw.optional.arm.FEAT_I8MM"},
    {"bf16", 1, 14, "hw.optional.arm.FEAT_BF16"},
};

#if defined(__linux__)
#include <sys/auxv.h>
static int has(const Feature *feature) {
    return getauxval(feature->word ? 26 : 16) >> feature->bit & 1;
}
#elif defined(__APPLE__)
static int has(const Feature *feature) { return said(feature->apple); }
#elif defined(_WIN32)
int IsProcessorFeaturePresent(unsigned feature);
static int has(const Feature *feature) {  // every Windows on ARM has NEON; 43: dot products
    if (feature->word) return 0;
    return feature->bit == 1 || IsProcessorFeaturePresent(43);
}
#else
static int has(const Feature *feature) { return feature->bit == 1 && !feature->word; }
#endif

#else
typedef struct { const char *name; } Feature;
static const Feature FEATURES[] = {{0}};
static int has(const Feature *feature) { return (void)feature, 0; }
#endif

// The name of feature `at`, as in Linux's /proc/cpuinfo, if present; "" if not; NULL after the last
// feature.
EXPORT const char *feature(int at) {
    if (at < 0 || at >= (int)(sizeof FEATURES / sizeof *FEATURES) || !FEATURES[at].name) return 0;
    return has(FEATURES + at) ? FEATURES[at].name : "";
}
