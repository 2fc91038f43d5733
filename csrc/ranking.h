// Finds the exact k-th largest of a tensor's keys (magnitudes of differences, variances, importances) without sorting:
// a sample gives a bracket, one pass counts the keys above it and sorts the few within it into buckets, and another
// pass sorts those into finer buckets. The result is exact whatever the sample says; a misleading one only costs time.
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
