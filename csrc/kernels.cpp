// See kernels.h. Works in blocks that stay in the first-level cache: convert to float32, apply the formula, convert
// back. Each loop has one job and no calls, so that it is vectorised. No standard library here: its inline functions
// would be compiled for this file's instruction set and might be linked into code that runs on any machine.
#include "kernels.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifndef GPTAILOR_SIMD
#define GPTAILOR_SIMD portable
#endif
#define GPTAILOR_STR2(x) #x
#define GPTAILOR_STR(x) GPTAILOR_STR2(x)
#define GPTAILOR_CAT2(a, b) a##b
#define GPTAILOR_CAT(a, b) GPTAILOR_CAT2(a, b)

namespace gptailor {
namespace {

constexpr int64_t kBlock = 512;

// Tensors in a file may start at any byte.
typedef uint16_t Unaligned16 __attribute__((aligned(1), may_alias));
typedef float UnalignedF32 __attribute__((aligned(1), may_alias));

void load(const std::byte* in, DType dtype, int64_t n, float* __restrict out) {
  if (dtype == DType::F32) {
    memcpy(out, in, static_cast<size_t>(n) * 4);
    return;
  }
  const Unaligned16* x = reinterpret_cast<const Unaligned16*>(in);
  if (dtype == DType::BF16) {
    for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_f32(x[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = f16_to_f32(x[i]);
  }
}

void store(const float* __restrict x, int64_t n, DType dtype, std::byte* out) {
  if (dtype == DType::F32) {
    memcpy(out, x, static_cast<size_t>(n) * 4);
    return;
  }
  Unaligned16* __restrict y = reinterpret_cast<Unaligned16*>(out);
  if (dtype == DType::BF16) {
    for (int64_t i = 0; i < n; ++i) y[i] = f32_to_bf16(x[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = f32_to_f16(x[i]);
  }
}

bool any_nan(const float* x, int64_t n) {
  uint32_t any = 0;
  for (int64_t i = 0; i < n; ++i) any |= magnitude_bits(x[i]) > kInfBits ? 1u : 0u;
  return any != 0;
}

using Block = float[kBlock];

void load_source(const MergeJob& job, const Slice& slice, int s, int64_t i, int64_t n, float* out) {
  const DType dtype = job.sources[s].dtype;
  load(slice.sources[s] + i * mergeable_bytes(dtype), dtype, n, out);
}

void load_base(const MergeJob& job, const Slice& slice, int64_t i, int64_t n, float* out) {
  load(slice.base + i * mergeable_bytes(job.base.dtype), job.base.dtype, n, out);
}

void subtract(float* __restrict x, const float* __restrict base, int64_t n) {
  for (int64_t j = 0; j < n; ++j) x[j] -= base[j];
}

// Whole groups of words from an element whose index divides by kPhiloxWords on. Round by round over all groups: each
// round is one loop that is vectorised.
void random_groups(PhiloxKey key, uint32_t source, uint64_t position, int64_t n_groups, uint32_t* __restrict out) {
  constexpr int64_t kGroups = kBlock / kPhiloxWords;
  alignas(64) uint32_t c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (int64_t g = 0; g < n_groups; ++g) {
    c0[g] = static_cast<uint32_t>(position + static_cast<uint64_t>(g));
    c1[g] = static_cast<uint32_t>((position + static_cast<uint64_t>(g)) >> 32);
    c2[g] = source, c3[g] = 0;
  }
  for (int round = 0; round < kPhiloxRounds; ++round, key = next_key(key))
    for (int64_t g = 0; g < n_groups; ++g) philox_round(key, c0[g], c1[g], c2[g], c3[g]);
  for (int64_t g = 0; g < n_groups; ++g) {
    out[kPhiloxWords * g] = c0[g], out[kPhiloxWords * g + 1] = c1[g];
    out[kPhiloxWords * g + 2] = c2[g], out[kPhiloxWords * g + 3] = c3[g];
  }
}

void random(PhiloxKey key, int source, int64_t begin, int64_t n, uint32_t* out) {
  const auto s = static_cast<uint32_t>(source);
  for (int64_t i = 0; i < n;) {
    const int64_t first = begin + i, skipped = first % kPhiloxWords;
    const auto position = static_cast<uint64_t>(first / kPhiloxWords);
    if (skipped == 0 && n - i >= kPhiloxWords) {
      const int64_t m = n - i < kBlock ? n - i : kBlock, groups = m / kPhiloxWords;
      random_groups(key, s, position, groups, out + i);
      i += groups * kPhiloxWords;
    } else {
      uint32_t words[kPhiloxWords];
      philox(key, position, s, words);
      for (int64_t k = skipped; k < kPhiloxWords && i < n; ++k, ++i) out[i] = words[k];
    }
  }
}

// The variance of each element's differences over the sources. `base` holds the base. Seen from the first source's
// difference, so that equal sources give zero.
void variances(const MergeJob& job, const Slice& slice, int64_t i, int64_t n, const float* __restrict base,
               float* __restrict out) {
  alignas(64) Block x;
  alignas(64) Block first;
  alignas(64) Block mean;
  const auto count = static_cast<float>(job.n_sources);
  load_source(job, slice, 0, i, n, first);
  subtract(first, base, n);
  for (int64_t j = 0; j < n; ++j) mean[j] = out[j] = first[j] - first[j];  // 0, or NaN
  for (int s = 1; s < job.n_sources; ++s) {
    load_source(job, slice, s, i, n, x);
    for (int64_t j = 0; j < n; ++j) mean[j] += (x[j] - base[j]) - first[j];
  }
  for (int64_t j = 0; j < n; ++j) mean[j] /= count;
  for (int s = 0; s < job.n_sources; ++s) {
    load_source(job, slice, s, i, n, x);
    for (int64_t j = 0; j < n; ++j) {
      const float off = ((x[j] - base[j]) - first[j]) - mean[j];
      out[j] += off * off;
    }
  }
  for (int64_t j = 0; j < n; ++j) out[j] /= count;
}

// |d| times the number of its row; `first` is the index of the first element in the tensor.
void importances(const MergeJob& job, int64_t first, int64_t n, const float* __restrict d, float* __restrict out) {
  for (int64_t j = 0; j < n;) {
    const int64_t row = (first + j) / job.row_length;
    const int64_t end = (row + 1) * job.row_length - first;
    const double scale = job.row_scales[row];
    for (const int64_t stop = end < n ? end : n; j < stop; ++j)
      out[j] = static_cast<float>(static_cast<double>(float_from_bits(magnitude_bits(d[j]))) * scale);
  }
}

// Sets differences that do not take part to zero. By multiplication where a mask decides, so that NaN stays NaN.
// `varied` holds the variances, for Keep::variance.
void apply_keep(const MergeJob& job, int s, int64_t first, int64_t n, const float* __restrict varied,
                float* __restrict d) {
  const Params& p = job.params;
  if (job.keep == Keep::magnitude) {
    const uint32_t low = p.low[s], high = p.high[s];
    for (int64_t j = 0; j < n; ++j) d[j] = keeps_magnitude(d[j], low, high) ? d[j] : 0.0f;
  } else if (job.keep == Keep::random) {
    if (p.chances[s] >= kAlways) return;
    uint32_t words[kBlock];
    random(p.key, s, first, n, words);
    const auto below = static_cast<uint32_t>(p.chances[s]);
    for (int64_t j = 0; j < n; ++j) d[j] *= words[j] < below ? 1.0f : 0.0f;
  } else if (job.keep == Keep::ranked) {
    const uint64_t* bits = job.ranked[s];
    if (bits == nullptr) return;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t e = first + j;
      d[j] *= static_cast<float>((bits[e >> 6] >> (e & 63)) & 1);
    }
  } else if (job.keep == Keep::variance) {
    const uint32_t low = p.low[0];
    for (int64_t j = 0; j < n; ++j) d[j] *= bits_of(varied[j]) >= low ? 1.0f : 0.0f;
  } else if (job.keep == Keep::importance) {
    alignas(64) Block important;
    const uint32_t low = p.low[0];
    importances(job, first, n, d, important);
    for (int64_t j = 0; j < n; ++j) d[j] *= bits_of(important[j]) >= low ? 1.0f : 0.0f;
  }
}

void scale(float factor, int64_t n, float* d) {
  for (int64_t j = 0; j < n; ++j) d[j] *= factor;
}

template <class F, bool kSubtract>
void step(const float* __restrict x, const float* __restrict base, float weight, const Params& params, int64_t n,
          Block* __restrict state) {
  const Params p = params;
  for (int64_t j = 0; j < n; ++j) {
    float s[F::kState];
    for (int k = 0; k < F::kState; ++k) s[k] = state[k][j];
    F::step(s, kSubtract ? x[j] - base[j] : x[j], weight, p);
    for (int k = 0; k < F::kState; ++k) state[k][j] = s[k];
  }
}

template <class F>
void step_varying(const float* __restrict x, const float* __restrict weights, const Params& params, int64_t n,
                  Block* __restrict state) {
  const Params p = params;
  for (int64_t j = 0; j < n; ++j) {
    float s[F::kState];
    for (int k = 0; k < F::kState; ++k) s[k] = state[k][j];
    F::step(s, x[j], weights[j], p);
    for (int k = 0; k < F::kState; ++k) state[k][j] = s[k];
  }
}

// The weight of source s at each of n elements from `first` on.
void spread_weights(const MergeJob& job, int s, int64_t first, int64_t n, float* __restrict out) {
  for (int64_t j = 0; j < n;) {
    const int64_t row = (first + j) / job.row_length, column = (first + j) % job.row_length;
    const int64_t left = job.row_length - column, m = left < n - j ? left : n - j;
    if (job.weights_by == Weights::rows) {
      const float weight = job.weights[row * job.n_sources + s];
      for (int64_t k = 0; k < m; ++k) out[j + k] = weight;
    } else {
      memcpy(out + j, job.weights + s * job.row_length + column, static_cast<size_t>(m) * sizeof(float));
    }
    j += m;
  }
}

// The weight of source s at each element, from its statistics. NaN stays.
void load_statistics(const MergeJob& job, const Slice& slice, int s, int64_t i, int64_t n, float* __restrict out) {
  const DType dtype = job.statistics[s].dtype;
  load(slice.statistics[s] + i * mergeable_bytes(dtype), dtype, n, out);
  const float least = job.params.epsilon, weight = job.params.weights[s];
  for (int64_t j = 0; j < n; ++j) out[j] = weight * (out[j] < least ? least : out[j]);
}

template <class F>
void finish(const Block* __restrict state, const float* __restrict base, const Params& params, int64_t n,
            float* __restrict out) {
  const Params p = params;
  for (int64_t j = 0; j < n; ++j) {
    float s[F::kState];
    for (int k = 0; k < F::kState; ++k) s[k] = state[k][j];
    out[j] = F::end(s, F::kUsesBase ? base[j] : 0.0f, p);
  }
}

bool copy(const MergeJob& job, const Slice& slice, std::byte* out) {
  const int64_t out_bytes = mergeable_bytes(job.out_dtype);
  const bool same = job.sources[0].dtype == job.out_dtype;
  if (same) memcpy(out, slice.sources[0], static_cast<size_t>(slice.n * out_bytes));
  if (same && !job.check_nan) return false;
  alignas(64) Block x;
  bool nan = false;
  for (int64_t i = 0; i < slice.n; i += kBlock) {
    const int64_t n = slice.n - i < kBlock ? slice.n - i : kBlock;
    load_source(job, slice, 0, i, n, x);
    if (job.check_nan) nan |= any_nan(x, n);
    if (!same) store(x, n, job.out_dtype, out + i * out_bytes);
  }
  return nan;
}

template <class F>
bool merge_as(const MergeJob& job, const Slice& slice, std::byte* out) {
  alignas(64) Block state[F::kState];
  alignas(64) Block x;
  alignas(64) Block base;
  alignas(64) Block spread;
  alignas(64) Block varied;
  const int64_t out_bytes = mergeable_bytes(job.out_dtype);
  const Params& p = job.params;
  bool nan = false;
  for (int64_t i = 0; i < slice.n; i += kBlock) {
    const int64_t n = slice.n - i < kBlock ? slice.n - i : kBlock;
    for (int k = 0; k < F::kState; ++k)
      for (int64_t j = 0; j < kBlock; ++j) state[k][j] = kEmptySum;
    if (F::kUsesBase) load_base(job, slice, i, n, base);
    if (job.keep == Keep::variance) variances(job, slice, i, n, base, varied);
    for (int s = 0; s < job.n_sources; ++s) {
      load_source(job, slice, s, i, n, x);
      if (job.keep == Keep::all && job.weights_by == Weights::whole) {
        step<F, F::kTakesDelta>(x, base, p.weights[s], p, n, state);
        continue;
      }
      if (F::kTakesDelta) {
        subtract(x, base, n);
        apply_keep(job, s, slice.begin + i, n, varied, x);
        if (p.scales[s] != 1.0f) scale(p.scales[s], n, x);
      }
      if (job.weights_by == Weights::whole) {
        step<F, false>(x, base, p.weights[s], p, n, state);
      } else {
        if (job.weights_by == Weights::elements) load_statistics(job, slice, s, i, n, spread);
        else spread_weights(job, s, slice.begin + i, n, spread);
        step_varying<F>(x, spread, p, n, state);
      }
    }
    finish<F>(state, base, p, n, x);
    if (job.check_nan) nan |= any_nan(x, n);
    store(x, n, job.out_dtype, out + i * out_bytes);
  }
  return nan;
}

bool merge(const MergeJob& job, const Slice& slice, std::byte* out) {
  if (job.is_copy) return copy(job, slice, out);
  switch (job.formula) {
    case Formula::linear: return merge_as<Linear>(job, slice, out);
    case Formula::task_arithmetic: return merge_as<TaskArithmetic>(job, slice, out);
    case Formula::ties: return merge_as<Ties>(job, slice, out);
    case Formula::sce: return merge_as<Sce>(job, slice, out);
    case Formula::ram: return merge_as<Ram>(job, slice, out);
    case Formula::nearswap: return merge_as<NearSwap>(job, slice, out);
    case Formula::fisher: return merge_as<Fisher>(job, slice, out);
  }
  return false;
}

double fold(double (&lanes)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

// Lanes of a last, short group read zeros, which add +0 to sums that start at +0.
void pad(float* x, int64_t n) {
  for (int64_t j = n; j < kBlock && j % kLanes != 0; ++j) x[j] = 0.0f;
}

void load_vectors(const MergeJob& job, bool deltas, const Slice& slice, int64_t i, int64_t n, Block* x) {
  alignas(64) Block base;
  if (deltas) load_base(job, slice, i, n, base);
  for (int s = 0; s < job.n_sources; ++s) {
    load_source(job, slice, s, i, n, x[s]);
    if (deltas) subtract(x[s], base, n);
    pad(x[s], n);
  }
}

void add_products(const float* __restrict x, const float* __restrict y, int64_t n, double* __restrict lanes) {
  double sums[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] = lanes[lane];
  for (int64_t j = 0; j < n; j += kLanes)
    for (int lane = 0; lane < kLanes; ++lane)
      sums[lane] += static_cast<double>(x[j + lane]) * static_cast<double>(y[j + lane]);
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = sums[lane];
}

void gram(const MergeJob& job, bool deltas, const Slice& slice, double* sums) {
  alignas(64) Block x[kMaxSources];
  alignas(64) double lanes[kMaxPairs][kLanes];
  const int pairs = n_pairs(job.n_sources);
  for (int pair = 0; pair < pairs; ++pair)
    for (int lane = 0; lane < kLanes; ++lane) lanes[pair][lane] = 0.0;
  for (int64_t i = 0; i < slice.n; i += kBlock) {
    const int64_t n = slice.n - i < kBlock ? slice.n - i : kBlock;
    load_vectors(job, deltas, slice, i, n, x);
    for (int a = 0, pair = 0; a < job.n_sources; ++a)
      for (int b = a; b < job.n_sources; ++b, ++pair) add_products(x[a], x[b], n, lanes[pair]);
  }
  for (int pair = 0; pair < pairs; ++pair) sums[pair] = fold(lanes[pair]);
}

void gram_columns(const MergeJob& job, bool deltas, const Slice& slice, double* sums, int64_t stride) {
  alignas(64) Block x[kMaxSources];
  for (int64_t i = 0; i < slice.n; i += kBlock) {
    const int64_t n = slice.n - i < kBlock ? slice.n - i : kBlock;
    load_vectors(job, deltas, slice, i, n, x);
    double* __restrict to = sums + i;
    for (int a = 0; a < job.n_sources; ++a)
      for (int b = a; b < job.n_sources; ++b, to += stride)
        for (int64_t j = 0; j < n; ++j) to[j] += static_cast<double>(x[a][j]) * static_cast<double>(x[b][j]);
  }
}

void block_keys(const MergeJob& job, const Slice& slice, Key key, int source, int64_t i, int64_t n,
                uint32_t* __restrict bits) {
  alignas(64) Block x;
  alignas(64) Block base;
  load_base(job, slice, i, n, base);
  if (key == Key::variance) {
    variances(job, slice, i, n, base, x);
  } else {
    load_source(job, slice, source, i, n, x);
    if (key == Key::magnitude) {
      for (int64_t j = 0; j < n; ++j) bits[j] = magnitude_bits(x[j] - base[j]);
      return;
    }
    subtract(x, base, n);
    importances(job, slice.begin + i, n, x, base);
    for (int64_t j = 0; j < n; ++j) bits[j] = magnitude_bits(base[j]);
    return;
  }
  for (int64_t j = 0; j < n; ++j) bits[j] = magnitude_bits(x[j]);
}

void keys(const MergeJob& job, const Slice& slice, Key key, int source, uint32_t* bits) {
  for (int64_t i = 0; i < slice.n; i += kBlock)
    block_keys(job, slice, key, source, i, slice.n - i < kBlock ? slice.n - i : kBlock, bits + i);
}

uint32_t largest(const uint32_t* bits, int64_t n) {
  uint32_t most = 0;
  for (int64_t j = 0; j < n; ++j) most = bits[j] > most ? bits[j] : most;
  return most;
}

// Moves what lies in [low, low + width] to the front of `found`, which has room for all; returns how many.
int64_t keep_within(const uint32_t* __restrict bits, int64_t n, uint32_t low, uint32_t width,
                    uint32_t* __restrict found) {
  int64_t m = 0;
#ifdef __AVX512F__
  const __m512i lows = _mm512_set1_epi32(static_cast<int>(low)), widths = _mm512_set1_epi32(static_cast<int>(width));
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 valid = n - j >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << (n - j)) - 1);
    const __m512i b = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(valid, bits + j), lows);
    const __mmask16 within = _mm512_mask_cmple_epu32_mask(valid, b, widths);
    if (within == 0) continue;
    _mm512_storeu_si512(found + m, _mm512_maskz_compress_epi32(within, b));
    m += __builtin_popcount(within);
  }
#else
  constexpr int64_t kGroup = 32;
  for (int64_t g = 0; g < n; g += kGroup) {
    const int64_t end = g + kGroup < n ? g + kGroup : n;
    uint32_t any = 0;
    for (int64_t j = g; j < end; ++j) any |= bits[j] - low <= width ? 1u : 0u;
    if (any == 0) continue;
    for (int64_t j = g; j < end; ++j) {
      found[m] = bits[j] - low;
      m += bits[j] - low <= width;
    }
  }
#endif
  return m;
}

// What one bracket has found within a slice. Neighbours often fall into one bucket; two histograms keep the additions
// from waiting for each other.
struct Tally {
  uint32_t even[kBracketBuckets], odd[kBracketBuckets];
  int64_t above;
};

void tally(const uint32_t* bits, int64_t n, const Bracket& bracket, Tally& t) {
  alignas(64) uint32_t found[kBlock + 16];  // whole vectors are stored
  const uint32_t high = bracket.high;
  uint32_t more = 0;
  for (int64_t j = 0; j < n; ++j) more += bits[j] > high ? 1u : 0u;
  t.above += more;
  const int64_t m = keep_within(bits, n, bracket.low, bracket.high - bracket.low, found);
  const int shift = bracket.shift;
  int64_t j = 0;
  for (; j + 1 < m; j += 2) {
    ++t.even[found[j] >> shift];
    ++t.odd[found[j + 1] >> shift];
  }
  if (j < m) ++t.even[found[j] >> shift];
}

bool count(const MergeJob& job, const Slice& slice, Key key, int source, const Bracket* brackets, int n_brackets,
           int64_t* above, int64_t* buckets) {
  constexpr int kAtOnce = 3;
  alignas(64) uint32_t bits[kBlock];
  uint32_t most = 0;
  for (int first = 0; first < n_brackets; first += kAtOnce) {
    const int m = n_brackets - first < kAtOnce ? n_brackets - first : kAtOnce;
    Tally tallies[kAtOnce];
    memset(tallies, 0, sizeof(Tally) * static_cast<size_t>(m));
    for (int64_t i = 0; i < slice.n; i += kBlock) {
      const int64_t n = slice.n - i < kBlock ? slice.n - i : kBlock;
      block_keys(job, slice, key, source, i, n, bits);
      const uint32_t here = largest(bits, n);
      most = here > most ? here : most;
      for (int k = 0; k < m; ++k) tally(bits, n, brackets[first + k], tallies[k]);
    }
    for (int k = 0; k < m; ++k) {
      above[first + k] += tallies[k].above;
      int64_t* to = buckets + (first + k) * kBracketBuckets;
      for (int b = 0; b < kBracketBuckets; ++b) to[b] += static_cast<int64_t>(tallies[k].even[b]) + tallies[k].odd[b];
    }
  }
  return most > kInfBits;
}

Moments moments(const MergeJob& job, const Slice& slice, int source) {
  alignas(64) Block x;
  alignas(64) Block base;
  alignas(64) Block varied;
  alignas(64) double all[kLanes] = {}, kept[kLanes] = {}, kept_sq[kLanes] = {};
  for (int64_t i = 0; i < slice.n; i += kBlock) {
    const int64_t n = slice.n - i < kBlock ? slice.n - i : kBlock;
    load_base(job, slice, i, n, base);
    if (job.keep == Keep::variance) variances(job, slice, i, n, base, varied);
    load_source(job, slice, source, i, n, x);
    subtract(x, base, n);
    pad(x, n);
    for (int64_t j = 0; j < n; j += kLanes)
      for (int lane = 0; lane < kLanes; ++lane)
        all[lane] += static_cast<double>(float_from_bits(magnitude_bits(x[j + lane])));
    apply_keep(job, source, slice.begin + i, n, varied, x);
    for (int64_t j = 0; j < n; j += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) {
        const auto d = static_cast<double>(float_from_bits(magnitude_bits(x[j + lane])));
        kept[lane] += d;
        kept_sq[lane] += d * d;
      }
  }
  return {fold(all), fold(kept), fold(kept_sq)};
}

void places(const uint32_t* __restrict bits, int64_t n, float largest, int n_buckets, uint16_t* __restrict out) {
  const int32_t top = n_buckets - 2;
  const float scale = static_cast<float>(top) / largest;
  for (int64_t j = 0; j < n; ++j) {
    const auto at = static_cast<int32_t>(float_from_bits(bits[j]) * scale);
    const int32_t place = 1 + (at < top ? at : top);
    out[j] = static_cast<uint16_t>(bits[j] == 0 ? 0 : place);
  }
}

int64_t rank_at_place(const uint32_t* __restrict bits, const uint16_t* __restrict at, int64_t n, int64_t element) {
  const uint16_t place = at[element];
  const uint32_t own = bits[element];
  uint32_t below = 0;
  for (int64_t j = 0; j < element; ++j) below += (at[j] == place) & (bits[j] <= own) ? 1u : 0u;
  for (int64_t j = element + 1; j < n; ++j) below += (at[j] == place) & (bits[j] < own) ? 1u : 0u;
  return below;
}

double from_bits(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

uint64_t bits_of_double(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;

// exp(x) for x <= 0, and log(x) for normal x > 0, within a few units of the last place. Not the C library's, because
// these loops are vectorised, and because its results depend on the machine. NaN stays NaN.
void exp_of(double* __restrict x, int64_t n) {
  constexpr double kRound = 0x1.8p52;  // adding it leaves an integer in the low bits
  for (int64_t j = 0; j < n; ++j) {
    const double v = x[j] < -700.0 ? -700.0 : x[j];
    const double shifted = v * 0x1.71547652b82fep0 + kRound, k = shifted - kRound;
    const double r = (v - k * kLn2High) - k * kLn2Low;
    double p = 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r * r + r + 1.0;
    x[j] = p * from_bits((bits_of_double(shifted) + 1023) << 52);
  }
}

double log_of(double x) {
  // The mantissa between sqrt(1/2) and sqrt(2); the exponent made a double by way of its bits.
  const uint64_t bits = bits_of_double(x), moved = bits - 0x3fe6a09e667f3bcdu;
  const double m = from_bits(bits - (moved & 0xfff0000000000000u));
  // moved >> 52 with its sign, as an offset that is never negative
  const double k = from_bits(0x4330000000000000u | ((moved + (uint64_t{2048} << 52)) >> 52 & 0xfff)) - (0x1p52 + 2048.0);
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double p = 1.0 / 21.0;
  p = p * z + 1.0 / 19.0;
  p = p * z + 1.0 / 17.0;
  p = p * z + 1.0 / 15.0;
  p = p * z + 1.0 / 13.0;
  p = p * z + 1.0 / 11.0;
  p = p * z + 1.0 / 9.0;
  p = p * z + 1.0 / 7.0;
  p = p * z + 1.0 / 5.0;
  p = p * z + 1.0 / 3.0;
  return k * kLn2High + (2.0 * s + (2.0 * s * z * p + k * kLn2Low));
}

// exp(x - max x) in double, and their sum.
double exponentials(const std::byte* in, DType dtype, int64_t n, double* __restrict out) {
  alignas(64) Block x;
  float most = -__builtin_huge_valf();
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    load(in + i * mergeable_bytes(dtype), dtype, m, x);
    for (int64_t j = 0; j < m; ++j) most = x[j] > most ? x[j] : most;
    for (int64_t j = 0; j < m; ++j) out[i + j] = static_cast<double>(x[j]);
  }
  const auto shift = static_cast<double>(most);
  for (int64_t j = 0; j < n; ++j) out[j] -= shift;
  exp_of(out, n);
  alignas(64) double lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += out[j + lane];
  for (int lane = 0; j + lane < n; ++lane) lanes[lane] += out[j + lane];
  return fold(lanes);
}

double divergence(const MergeJob& job, const Slice& slice, double* room) {
  const int64_t n = slice.n;
  double* __restrict p = room;
  double* __restrict q = room + n;
  const double p_sum = exponentials(slice.sources[0], job.sources[0].dtype, n, p);
  const double q_sum = exponentials(slice.base, job.base.dtype, n, q);
  for (int64_t j = 0; j < n; ++j) {
    const double a = p[j] / p_sum + 1e-8, b = q[j] / q_sum + 1e-8;
    p[j] = a * log_of(a / b);
  }
  alignas(64) double lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += p[j + lane];
  for (int lane = 0; j + lane < n; ++lane) lanes[lane] += p[j + lane];
  return fold(lanes);
}

}  // namespace

extern const Kernels GPTAILOR_CAT(kernels_, GPTAILOR_SIMD);
const Kernels GPTAILOR_CAT(kernels_, GPTAILOR_SIMD) = {
    GPTAILOR_STR(GPTAILOR_SIMD), merge, gram, gram_columns, count, keys, moments, random, largest, places, rank_at_place, divergence, load};

}  // namespace gptailor
