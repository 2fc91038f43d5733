// Keys that can be ranked, as bits that are ordered like the numbers: counted by bracket, and placed into buckets.
// Part of kernels.cpp, which is compiled for each instruction set: everything has internal linkage.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "kernel_blocks.h"

namespace gptailor {
namespace {

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

// Copies all values in [low, low + width], minus low, to the front of `found`, which has room for all; returns how
// many.
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

// The counts of one bracket within a slice. Neighbours often fall into the same bucket; with two histograms, additions
// do not wait for each other.
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

}  // namespace
}  // namespace gptailor
