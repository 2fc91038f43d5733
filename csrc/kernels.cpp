// See kernels.h. Works in blocks that stay in the first-level cache: convert to float32, apply the formula, convert
// back. Each loop has one job and no calls, so that it is vectorised. No standard library here: its inline functions
// would be compiled for this file's instruction set and might be linked into code that runs on any machine.
#include "kernels.h"

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

void load(const Input& in, int64_t begin, int64_t n, float* __restrict out) {
  if (in.dtype == DType::F32) {
    memcpy(out, in.data + begin * 4, static_cast<size_t>(n) * 4);
    return;
  }
  const Unaligned16* x = reinterpret_cast<const Unaligned16*>(in.data + begin * 2);
  if (in.dtype == DType::BF16) {
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

template <class F>
void step(const float* __restrict x, const float* __restrict base, float weight, uint32_t threshold, int64_t n,
          Block* __restrict state) {
  for (int64_t j = 0; j < n; ++j) {
    float s[F::kState];
    for (int k = 0; k < F::kState; ++k) s[k] = state[k][j];
    F::step(s, x[j], F::kUsesBase ? base[j] : 0.0f, weight, threshold);
    for (int k = 0; k < F::kState; ++k) state[k][j] = s[k];
  }
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

bool copy(const MergeJob& job, int64_t begin, int64_t end, std::byte* out) {
  const Input& in = job.sources[0];
  const int64_t out_bytes = mergeable_bytes(job.out_dtype);
  const bool same = in.dtype == job.out_dtype;
  if (same) memcpy(out, in.data + begin * out_bytes, static_cast<size_t>((end - begin) * out_bytes));
  if (same && !job.check_nan) return false;
  alignas(64) Block x;
  bool nan = false;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    load(in, i, n, x);
    if (job.check_nan) nan |= any_nan(x, n);
    if (!same) store(x, n, job.out_dtype, out + (i - begin) * out_bytes);
  }
  return nan;
}

template <class F>
bool merge_as(const MergeJob& job, int64_t begin, int64_t end, std::byte* out) {
  alignas(64) Block state[F::kState];
  alignas(64) Block x;
  alignas(64) Block base;
  const int64_t out_bytes = mergeable_bytes(job.out_dtype);
  bool nan = false;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    for (int k = 0; k < F::kState; ++k)
      for (int64_t j = 0; j < kBlock; ++j) state[k][j] = kEmptySum;
    if (F::kUsesBase) load(job.base, i, n, base);
    for (int s = 0; s < job.n_sources; ++s) {
      load(job.sources[s], i, n, x);
      step<F>(x, base, job.params.weights[s], job.params.thresholds[s], n, state);
    }
    finish<F>(state, base, job.params, n, x);
    if (job.check_nan) nan |= any_nan(x, n);
    store(x, n, job.out_dtype, out + (i - begin) * out_bytes);
  }
  return nan;
}

bool merge(const MergeJob& job, int64_t begin, int64_t end, std::byte* out) {
  if (job.is_copy) return copy(job, begin, end, out);
  if (job.method == Method::task_arithmetic) return merge_as<TaskArithmetic>(job, begin, end, out);
  if (job.method == Method::ties) return merge_as<Ties>(job, begin, end, out);
  return merge_as<Linear>(job, begin, end, out);
}

double fold(double (&lanes)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

DotSums dot(const Input& in0, const Input& in1, int64_t begin, int64_t end) {
  alignas(64) Block x;
  alignas(64) Block y;
  alignas(64) double xx[kLanes] = {}, yy[kLanes] = {}, xy[kLanes] = {};
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    load(in0, i, n, x);
    load(in1, i, n, y);
    for (int64_t j = n; j < kBlock && j % kLanes != 0; ++j) x[j] = y[j] = 0.0f;  // adds +0 to sums that start at +0
    for (int64_t j = 0; j < n; j += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const double a = x[j + lane], b = y[j + lane];
        xx[lane] += a * a;
        yy[lane] += b * b;
        xy[lane] += a * b;
      }
    }
  }
  return {fold(xx), fold(yy), fold(xy)};
}

// Moves those with the prefix to the front, without branches that would be mispredicted; returns how many.
int64_t keep_matching(uint32_t* bits, int64_t n, int above, uint32_t prefix) {
  constexpr int64_t kGroup = 64;
  int64_t m = 0;
  for (int64_t g = 0; g < n; g += kGroup) {
    const int64_t end = g + kGroup < n ? g + kGroup : n;
    uint32_t any = 0;
    for (int64_t j = g; j < end; ++j) any |= (bits[j] >> above) == prefix ? 1u : 0u;
    if (any == 0) continue;  // the rule, in the last pass
    for (int64_t j = g; j < end; ++j) {
      const uint32_t b = bits[j];
      bits[m] = b;
      m += (b >> above) == prefix;
    }
  }
  return m;
}

bool radix_count(const Input& source, const Input& base, int64_t begin, int64_t end, int pass, uint32_t prefix,
                 uint32_t* histogram) {
  alignas(64) Block x;
  alignas(64) Block y;
  uint32_t bits[kBlock];
  const int shift = radix_shift(pass);
  const uint32_t mask = static_cast<uint32_t>(radix_buckets(pass)) - 1;
  const int above = pass == 0 ? 31 : radix_shift(pass - 1);
  uint32_t largest = 0;
  // Neighbours often fall into one bucket; two histograms keep the additions from waiting for each other.
  uint32_t odd[kRadixBuckets] = {};
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    load(source, i, n, x);
    load(base, i, n, y);
    for (int64_t j = 0; j < n; ++j) bits[j] = magnitude_bits(x[j] - y[j]);
    int64_t m = n;
    if (pass == 0) {
      for (int64_t j = 0; j < n; ++j) largest = bits[j] > largest ? bits[j] : largest;
    } else {
      m = keep_matching(bits, n, above, prefix);
    }
    int64_t j = 0;
    for (; j + 1 < m; j += 2) {
      ++histogram[(bits[j] >> shift) & mask];
      ++odd[(bits[j + 1] >> shift) & mask];
    }
    if (j < m) ++histogram[(bits[j] >> shift) & mask];
  }
  for (int b = 0; b < kRadixBuckets; ++b) histogram[b] += odd[b];
  return largest > kInfBits;
}

}  // namespace

extern const Kernels GPTAILOR_CAT(kernels_, GPTAILOR_SIMD);
const Kernels GPTAILOR_CAT(kernels_, GPTAILOR_SIMD) = {GPTAILOR_STR(GPTAILOR_SIMD), merge, dot, radix_count};

}  // namespace gptailor
