// Every merge formula, once, for one element: the CPU kernels and the CUDA kernels call these same functions.
// float32 throughout, terms in source order, and compiled without contraction into fused multiply-adds, so that both
// give the same bits. Every formula passes a NaN in any input on to its result; the NaN check relies on that.
#pragma once

#include <cmath>

#include "dtype.h"

namespace gptailor {

inline constexpr int kMaxSources = 16;

enum class Method : uint8_t { linear, task_arithmetic, slerp, ties };

// What the formulas need besides the elements. Plain data: it is passed to kernels by value.
struct Params {
  float weights[kMaxSources] = {};
  uint32_t thresholds[kMaxSources] = {};  // ties: magnitude bits of the smallest delta that is kept
  float divisor = 1.0f;                   // linear, task_arithmetic: what the sum is divided by
  float lambda = 1.0f;
  bool normalize = false;
};

// Starts from the first term, not from zero: 0 + -0 would lose a sign.
template <int N>
GPTAILOR_HD float weighted_sum(const float (&x)[N], const Params& p) {
  float sum = p.weights[0] * x[0];
  for (int i = 1; i < N; ++i) sum += p.weights[i] * x[i];
  return sum;
}

// linear: sum_i w_i x_i, divided by sum_i w_i if normalize. slerp too, once its two weights are known.
template <int N>
GPTAILOR_HD float linear(const float (&x)[N], const Params& p) {
  const float sum = weighted_sum<N>(x, p);
  return p.normalize ? sum / p.divisor : sum;
}

// task_arithmetic: base + lambda * sum_i w_i (x_i - base), the sum divided by sum_i w_i if normalize.
template <int N>
GPTAILOR_HD float task_arithmetic(const float (&x)[N], float base, const Params& p) {
  float delta[N];
  for (int i = 0; i < N; ++i) delta[i] = x[i] - base;
  return base + p.lambda * linear<N>(delta, p);
}

// ties: trim each delta to its largest magnitudes, elect a sign from the weighted sum, add up what agrees with it.
template <int N>
GPTAILOR_HD float ties(const float (&x)[N], float base, const Params& p) {
  float delta[N];
  for (int i = 0; i < N; ++i) {
    const float d = x[i] - base;
    delta[i] = p.weights[i] * (magnitude_bits(d) >= p.thresholds[i] ? d : 0.0f);
  }
  float total = delta[0];
  for (int i = 1; i < N; ++i) total += delta[i];
  const float elected = total >= 0.0f ? 1.0f : -1.0f;
  float sum = 0.0f;
  float divisor = 0.0f;
  for (int i = 0; i < N; ++i) {
    const bool agrees = delta[i] * elected > 0.0f;
    sum += agrees ? delta[i] : 0.0f;
    divisor += agrees ? p.weights[i] : 0.0f;
  }
  if (p.normalize) sum /= (divisor < 1e-8f && divisor > -1e-8f) ? 1.0f : divisor;
  return base + p.lambda * (is_nan(total) ? total : sum);
}

template <Method M, int N>
GPTAILOR_HD float merge_one(const float (&x)[N], float base, const Params& p) {
  if constexpr (M == Method::task_arithmetic) return task_arithmetic<N>(x, base, p);
  else if constexpr (M == Method::ties) return ties<N>(x, base, p);
  else return linear<N>(x, p);
}

inline constexpr bool uses_base(Method m) { return m == Method::task_arithmetic || m == Method::ties; }

// slerp: the two weights, from the squared norms and the dot product of the whole tensors.
// Nearly parallel tensors (|cos| > 0.9995) are interpolated linearly: sin(theta) would be close to zero.
GPTAILOR_HD void slerp_weights(double norm0_sq, double norm1_sq, double dot, double t, float (&weights)[kMaxSources]) {
  const double eps = 1e-8;
  const double norm0 = sqrt(norm0_sq), norm1 = sqrt(norm1_sq);
  const double cosine = dot / ((norm0 > eps ? norm0 : 1.0) * (norm1 > eps ? norm1 : 1.0));
  if (cosine > 0.9995 || cosine < -0.9995) {
    weights[0] = static_cast<float>(1.0 - t);
    weights[1] = static_cast<float>(t);
  } else {
    const double theta = acos(cosine);
    weights[0] = static_cast<float>(sin((1.0 - t) * theta) / sin(theta));
    weights[1] = static_cast<float>(sin(t * theta) / sin(theta));
  }
}

// How reductions over a whole tensor are ordered, on the CPU and on the GPU: blocks of kReduceBlock elements; within a
// block, lane j adds up the elements j, j + kLanes, ...; lanes are folded in halves; blocks are added in their order.
inline constexpr int64_t kReduceBlock = 4096;
inline constexpr int kLanes = 32;

// How the k-th magnitude is found, on both: histograms of 11, then 10, then 10 of its 31 bits.
inline constexpr int kRadixPasses = 3;
inline constexpr int kRadixBuckets = 2048;
GPTAILOR_HD constexpr int radix_shift(int pass) { return pass == 0 ? 20 : pass == 1 ? 10 : 0; }
GPTAILOR_HD constexpr int radix_buckets(int pass) { return pass == 0 ? 2048 : 1024; }

}  // namespace gptailor
