// Blocks of elements as float32: loads and stores, random words, and which differences from the base stay.
// Part of kernels.cpp, which is compiled for each instruction set: everything has internal linkage.
#pragma once

#include "kernels.h"

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

// Returns whether a finite number has become infinite as F16. Nothing in a checkpoint is too large for the other types.
bool store(const float* __restrict x, int64_t n, DType dtype, std::byte* out) {
  if (dtype == DType::F32) {
    memcpy(out, x, static_cast<size_t>(n) * 4);
    return false;
  }
  Unaligned16* __restrict y = reinterpret_cast<Unaligned16*>(out);
  if (dtype == DType::BF16) {
    for (int64_t i = 0; i < n; ++i) y[i] = f32_to_bf16(x[i]);
    return false;
  }
  uint32_t any = 0;
  for (int64_t i = 0; i < n; ++i) {
    y[i] = f32_to_f16(x[i]);
    any |= overflows_f16(x[i]) ? 1u : 0u;
  }
  return any != 0;
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

// Whole groups of words, from an element whose index is a multiple of kPhiloxWords. Computed round by round over all
// groups, so that each round is one vectorised loop.
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

// The variance of each element's differences over the sources. `base` holds the base. Computed relative to the first
// source's difference, so that equal sources give zero.
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

// |d| times the factor of its row; `first` is the index of the first element in the tensor.
void importances(const MergeJob& job, int64_t first, int64_t n, const float* __restrict d, float* __restrict out) {
  for (int64_t j = 0; j < n;) {
    const int64_t row = (first + j) / job.row_length;
    const int64_t end = (row + 1) * job.row_length - first;
    const double scale = job.row_scales[row];
    for (const int64_t stop = end < n ? end : n; j < stop; ++j)
      out[j] = static_cast<float>(static_cast<double>(float_from_bits(magnitude_bits(d[j]))) * scale);
  }
}

// Sets differences that are not used to zero. A mask is applied by multiplication, so that NaN stays NaN.
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

}  // namespace
}  // namespace gptailor
