// The single-threaded inner loops. kernels.cpp is compiled once per instruction set; kernels() picks the best one that
// this machine supports (or the one named by the environment variable GPTAILOR_SIMD). All give the same bits.
#pragma once

#include <cstddef>

#include "coefficients.h"
#include "formulas.h"

namespace gptailor {

struct ByteReader;

// One input tensor: mapped (data), or read piece by piece (reader). Pointers are borrowed.
struct Input {
  const std::byte* data = nullptr;  // need not be aligned
  const ByteReader* reader = nullptr;
  int64_t reader_offset = 0;
  DType dtype = DType::F32;
};

// Where the weights of the weighted sums come from.
enum class Weights : uint8_t { whole, rows, columns, elements };

// One merge, as plain data.
struct MergeJob {
  Formula formula = Formula::linear;
  Keep keep = Keep::all;
  Weights weights_by = Weights::whole;
  int n_sources = 0;
  int64_t n_elements = 0;
  int64_t row_length = 1;  // of the last dimension
  bool is_vector = true;   // at most one dimension; not the same as a matrix of one row
  Input sources[kMaxSources];
  Input base;
  Input statistics[kMaxSources];  // fisher: the weight of each element of a source
  bool has_base = false;
  DType out_dtype = DType::F32;
  bool is_copy = false;  // one unchanged source: no arithmetic, at most a cast
  bool check_nan = true;
  bool check_overflow = true;
  Params params;
  const float* weights = nullptr;              // rows: [row][source]; columns: [source][column]
  const uint64_t* ranked[kMaxSources] = {};    // Keep::ranked: a bit for each element
  const double* row_scales = nullptr;           // Keep::importance: [row]
};

// Elements [begin, begin + n) of a job's inputs, in memory.
struct Slice {
  int64_t begin = 0;
  int64_t n = 0;
  const std::byte* sources[kMaxSources] = {};  // each at element `begin`
  const std::byte* base = nullptr;
  const std::byte* statistics[kMaxSources] = {};
};

// The keys that can be ranked: |difference| of one source, the variance over the sources, or the importance of source
// 0.
enum class Key : uint8_t { magnitude, variance, importance };

struct Bracket {
  uint32_t low, high;  // inclusive
  int shift;           // (high - low) >> shift < kBracketBuckets
};
inline constexpr int kBracketBuckets = 2048;

struct Moments {
  double all, kept, kept_sq;  // sums of |d|, of the kept |d|, and of their squares
};

inline constexpr unsigned kFoundNan = 1, kFoundOverflow = 2;

struct Kernels {
  const char* name;
  // Merges the slice and writes it to `out`. Returns kFoundNan if a result is NaN and check_nan, kFoundOverflow if a
  // finite one is too large for out_dtype and check_overflow.
  unsigned (*merge)(const MergeJob&, const Slice&, std::byte* out);
  // Inner products of the sources, or of their differences from the base, over at most kReduceBlock elements:
  // n_pairs(n_sources) sums, overwritten.
  void (*gram)(const MergeJob&, bool deltas, const Slice&, double* sums);
  // Within one row: adds the product of each pair at each column to sums[pair * stride + column].
  void (*gram_columns)(const MergeJob&, bool deltas, const Slice&, double* sums, int64_t stride);
  // For each bracket, adds the number of keys above it to above[i], and counts those within it in their buckets,
  // buckets[i * kBracketBuckets ...]. Returns whether a key is NaN.
  bool (*count)(const MergeJob&, const Slice&, Key, int source, const Bracket*, int n_brackets, int64_t* above,
                int64_t* buckets);
  // The keys' bits; NaN is above kInfBits.
  void (*keys)(const MergeJob&, const Slice&, Key, int source, uint32_t* bits);
  // Over at most kReduceBlock elements, before Params::scales.
  Moments (*moments)(const MergeJob&, const Slice&, int source);
  // The random words of elements [begin, begin + n).
  void (*random)(PhiloxKey, int source, int64_t begin, int64_t n, uint32_t* words);
  // The largest of n magnitudes; and the place of each among `n_buckets` (at least 3) of equal width up to it, 0 for
  // zeros.
  uint32_t (*largest)(const uint32_t* bits, int64_t n);
  void (*places)(const uint32_t* bits, int64_t n, float largest, int n_buckets, uint16_t* places);
  // Of the magnitudes at the same place as `element`, how many are smaller, or equal and before it.
  int64_t (*rank_at_place)(const uint32_t* bits, const uint16_t* places, int64_t n, int64_t element);
  // KL(p || q) of the softmax of a row of the first source and of the base, with 1e-8 added to every probability. The
  // slice is the row; `room` holds 2 * n doubles.
  double (*divergence)(const MergeJob&, const Slice&, double* room);
  // Elements as float32.
  void (*load)(const std::byte*, DType, int64_t n, float*);
};

const Kernels& kernels();

}  // namespace gptailor
