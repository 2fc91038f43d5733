// The exact k-th largest of a tensor's keys (magnitudes of differences, variances, importances) without sorting: a
// sample says between which values it lies, one pass counts what is above and sorts the few in between into buckets,
// and another one into finer buckets. Right whatever the sample says, only slower if it misleads.
#pragma once

#include <vector>

#include "kernels.h"

namespace gptailor {

struct Wanted {
  Key key;
  int source;
  int64_t rank;       // 1 is the largest, n_elements the smallest
  uint32_t bits = 0;  // the result
};

// Fills in the results. Returns false if a key is NaN, which counts as larger than infinity.
bool find_ranked(const MergeJob& job, std::vector<Wanted>& wanted, int n_threads);

// How many keys are larger than zero.
int64_t count_nonzero(const MergeJob& job, Key key, int source, int n_threads, bool* nan);

}  // namespace gptailor
