// The single-threaded inner loops. kernels.cpp is compiled once per instruction set; kernels() picks the best set that
// this machine has (or the one that the environment variable GPTAILOR_SIMD names). All sets give the same bits.
#pragma once

#include <cstddef>

#include "formulas.h"

namespace gptailor {

struct Input {
  const std::byte* data = nullptr;  // need not be aligned
  DType dtype = DType::F32;
};

// One merge, as plain data. Pointers are borrowed.
struct MergeJob {
  Method method = Method::linear;
  int n_sources = 0;
  int64_t n_elements = 0;
  Input sources[kMaxSources];
  Input base;
  DType out_dtype = DType::F32;
  bool is_copy = false;  // one source, taken as it is: no arithmetic, at most a cast
  bool check_nan = true;
  Params params;
};

struct DotSums {
  double norm0_sq, norm1_sq, dot;
};

struct Kernels {
  const char* name;
  // Merges elements [begin, end) and writes them to `out`, which is where element `begin` goes.
  // Returns whether a result is NaN (always false unless check_nan).
  bool (*merge)(const MergeJob&, int64_t begin, int64_t end, std::byte* out);
  // The sums of one reduction block, at most kReduceBlock elements.
  DotSums (*dot)(const Input&, const Input&, int64_t begin, int64_t end);
  // One radix pass over |source - base| for elements [begin, end), at most 2^31: adds to histogram[kRadixBuckets] those
  // whose bits above the pass's are `prefix`. Returns whether a difference is NaN.
  bool (*radix_count)(const Input& source, const Input& base, int64_t begin, int64_t end, int pass, uint32_t prefix,
                      uint32_t* histogram);
};

const Kernels& kernels();

}  // namespace gptailor
