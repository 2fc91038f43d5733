// Every merge formula, once, for one element: the CPU kernels and the CUDA kernels call these same functions.
// A formula has a state of a few floats, a step for each source in order, and an end. float32 throughout, compiled
// without contraction into fused multiply-adds, so that both give the same bits. Every formula passes a NaN in any
// input on to its result; the NaN check relies on that.
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
  float factor = 1.0f;                    // the whole result is multiplied by it, before it is rounded
  bool normalize = false;
};

// Sums start here, not at 0: -0 + x is x for every x, a zero's sign included.
inline constexpr float kEmptySum = -0.0f;

// sum_i w_i x_i, divided by sum_i w_i if normalize. Also slerp, once its two weights are known.
struct Linear {
  static constexpr bool kUsesBase = false;
  static constexpr int kState = 1;
  GPTAILOR_HD static void step(float (&sum)[kState], float x, float /*base*/, float weight, uint32_t /*threshold*/) {
    sum[0] += weight * x;
  }
  GPTAILOR_HD static float end(const float (&sum)[kState], float /*base*/, const Params& p) {
    return p.factor * (p.normalize ? sum[0] / p.divisor : sum[0]);
  }
};

// base + lambda * sum_i w_i (x_i - base), the sum divided by sum_i w_i if normalize.
struct TaskArithmetic {
  static constexpr bool kUsesBase = true;
  static constexpr int kState = 1;
  GPTAILOR_HD static void step(float (&sum)[kState], float x, float base, float weight, uint32_t /*threshold*/) {
    sum[0] += weight * (x - base);
  }
  GPTAILOR_HD static float end(const float (&sum)[kState], float base, const Params& p) {
    return p.factor * (base + p.lambda * (p.normalize ? sum[0] / p.divisor : sum[0]));
  }
};

// Trims each delta to its largest magnitudes, elects the sign of their weighted sum, and adds up what agrees with it.
// The sign is known at the end only, so both candidates are added up on the way.
struct Ties {
  static constexpr bool kUsesBase = true;
  static constexpr int kState = 5;  // sum of all; sums of the positive and negative ones; and of their weights
  GPTAILOR_HD static void step(float (&s)[kState], float x, float base, float weight, uint32_t threshold) {
    const float delta = x - base;
    const float d = weight * (magnitude_bits(delta) >= threshold ? delta : 0.0f);
    s[0] += d;
    s[1] += d > 0.0f ? d : 0.0f;
    s[2] += d < 0.0f ? d : 0.0f;
    s[3] += d > 0.0f ? weight : 0.0f;
    s[4] += d < 0.0f ? weight : 0.0f;
  }
  GPTAILOR_HD static float end(const float (&s)[kState], float base, const Params& p) {
    const bool positive = s[0] >= 0.0f;
    const float weights = positive ? s[3] : s[4];
    const float divisor = magnitude_bits(weights) < kTinyBits || !p.normalize ? 1.0f : weights;
    const float sum = (positive ? s[1] : s[2]) / divisor;
    return p.factor * (base + p.lambda * (is_nan(s[0]) ? s[0] : sum));
  }

 private:
  static constexpr uint32_t kTinyBits = 0x322bcc77u;  // of 1e-8f
};

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
