// Activation functions over many numbers.
#include "vector_functions.h"

void activate(int64_t activation, float *x, int64_t count) {
    if (activation == NONE) return;
    for (int64_t i = 0; i < count; i += LANES) {
        Floats some = load_some(x + i, count - i);
        store_some(x + i, activate_lanes(activation, some), count - i);
    }
}
