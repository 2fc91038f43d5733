// Sums over blocks in the order given in formulas.h: inner products, magnitudes.
// Part of kernels.cpp, which is compiled for each instruction set: everything has internal linkage.
#pragma once

#include "kernel_blocks.h"

namespace gptailor {
namespace {

double fold(double (&lanes)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

// In a last, short group the remaining lanes read zeros, which add +0 to sums that start at +0.
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

}  // namespace
}  // namespace gptailor
