// The formulas over blocks.
// Part of kernels.cpp, which is compiled for each instruction set: everything has internal linkage.
#pragma once

#include "kernel_blocks.h"

namespace gptailor {
namespace {

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

unsigned found(const MergeJob& job, bool nan, bool overflow) {
  return (nan ? kFoundNan : 0u) | (overflow && job.check_overflow ? kFoundOverflow : 0u);
}

unsigned copy(const MergeJob& job, const Slice& slice, std::byte* out) {
  const int64_t out_bytes = mergeable_bytes(job.out_dtype);
  const bool same = job.sources[0].dtype == job.out_dtype;
  if (same) memcpy(out, slice.sources[0], static_cast<size_t>(slice.n * out_bytes));
  if (same && !job.check_nan) return 0;
  alignas(64) Block x;
  bool nan = false, overflow = false;
  for (int64_t i = 0; i < slice.n; i += kBlock) {
    const int64_t n = slice.n - i < kBlock ? slice.n - i : kBlock;
    load_source(job, slice, 0, i, n, x);
    if (job.check_nan) nan |= any_nan(x, n);
    if (!same) overflow |= store(x, n, job.out_dtype, out + i * out_bytes);
  }
  return found(job, nan, overflow);
}

template <class F>
unsigned merge_as(const MergeJob& job, const Slice& slice, std::byte* out) {
  alignas(64) Block state[F::kState];
  alignas(64) Block x;
  alignas(64) Block base;
  alignas(64) Block spread;
  alignas(64) Block varied;
  const int64_t out_bytes = mergeable_bytes(job.out_dtype);
  const Params& p = job.params;
  bool nan = false, overflow = false;
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
    overflow |= store(x, n, job.out_dtype, out + i * out_bytes);
  }
  return found(job, nan, overflow);
}

unsigned merge(const MergeJob& job, const Slice& slice, std::byte* out) {
  if (job.is_copy) return copy(job, slice, out);
  switch (job.formula) {
#define GPTAILOR_CASE(name, Struct) \
  case Formula::name: return merge_as<Struct>(job, slice, out);
    GPTAILOR_FORMULAS(GPTAILOR_CASE)
#undef GPTAILOR_CASE
  }
  return 0;
}

}  // namespace
}  // namespace gptailor
