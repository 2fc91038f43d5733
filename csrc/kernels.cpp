// See kernels.h. Works in blocks that stay in the first-level cache: convert to float32, apply the formula, convert
// back. Each loop does one thing without calls, so it is vectorised. The standard library is not used here: its inline
// functions would be compiled for this file's instruction set and might be linked into code that runs on any machine.
#include "kernels.h"

#include "kernel_keys.h"
#include "kernel_merge.h"
#include "kernel_softmax.h"
#include "kernel_sums.h"

#ifndef GPTAILOR_SIMD
#define GPTAILOR_SIMD portable
#endif
#define GPTAILOR_STR2(x) #x
#define GPTAILOR_STR(x) GPTAILOR_STR2(x)
#define GPTAILOR_CAT2(a, b) a##b
#define GPTAILOR_CAT(a, b) GPTAILOR_CAT2(a, b)

namespace gptailor {

extern const Kernels GPTAILOR_CAT(kernels_, GPTAILOR_SIMD);
const Kernels GPTAILOR_CAT(kernels_, GPTAILOR_SIMD) = {
    GPTAILOR_STR(GPTAILOR_SIMD), merge, gram, gram_columns, count, keys, moments, random,
    largest, places, rank_at_place, divergence, load};

}  // namespace gptailor
