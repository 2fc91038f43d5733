// The exact k-th largest magnitude of source - base, by radix select over the float's bits: three passes over the
// inputs, no copy of them, no sorting.
#pragma once

#include "kernels.h"

namespace gptailor {

// Sets job.params.thresholds so that the keep[i] largest |sources[i] - base| pass `magnitude_bits(d) >= threshold`;
// all elements equal to the k-th magnitude pass. keep[i] in [1, n_elements]. Returns false if a difference is NaN
// (then the thresholds are unspecified, unless check_nan is off: NaN counts as larger than infinity).
bool find_thresholds(MergeJob& job, const int64_t (&keep)[kMaxSources], int n_threads);

}  // namespace gptailor
