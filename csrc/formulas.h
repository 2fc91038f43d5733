// Every merge formula, once, for one element: the CPU kernels and the CUDA kernels call the same functions.
// A formula has a state of a few floats, a step for each source in order, and an end. float32 throughout, compiled
// without contraction into fused multiply-adds, so both give the same bits. Every formula passes a NaN in any input on
// to its result; the NaN check relies on that.
//
// A step takes the source's element, or its difference from the base after the keep stage (see Keep) if kTakesDelta.
#pragma once

#include <cmath>

#include "dtype.h"
#include "philox.h"

namespace gptailor {

inline constexpr int kMaxSources = 16;

// Every formula: the name by which methods declare it, and its struct below.
#define GPTAILOR_FORMULAS(FORMULA)          \
  FORMULA(linear, Linear)                   \
  FORMULA(task_arithmetic, TaskArithmetic)  \
  FORMULA(ties, Ties)                       \
  FORMULA(sce, Sce)                         \
  FORMULA(ram, Ram)                         \
  FORMULA(nearswap, NearSwap)               \
  FORMULA(fisher, Fisher)

#define GPTAILOR_NAME(name, Struct) name,
enum class Formula : uint8_t { GPTAILOR_FORMULAS(GPTAILOR_NAME) };
#undef GPTAILOR_NAME

// Which differences from the base are used; the others count as zero.
enum class Keep : uint8_t {
  all,
  magnitude,   // low <= |d| <= high
  random,      // a random word is below the source's chance
  ranked,      // random, larger ones likelier; decided beforehand, a bit for each element
  variance,    // the variance over the sources is >= low
  importance,  // |d| times a factor of its row is >= low
};

// What the formulas need besides the elements. Plain data: it is passed to kernels by value.
struct Params {
  float weights[kMaxSources] = {};
  uint32_t low[kMaxSources] = {};    // bits of the smallest magnitude that is kept
  uint32_t high[kMaxSources] = {};   // bits of the largest
  float scales[kMaxSources] = {};    // factors on what is kept
  uint64_t chances[kMaxSources] = {};
  PhiloxKey key;
  float divisor = 1.0f;  // linear, task_arithmetic: divides the sum
  float lambda = 1.0f;
  float factor = 1.0f;  // on the whole result, before it is rounded
  float epsilon = 0.0f;  // ram: differences up to this are ignored; fisher: lower bound of the information
  float t = 0.0f;        // nearswap
  bool normalize = false;
};

// Sums start with this, not with 0: -0 + x is x for every x, including the sign of a zero.
inline constexpr float kEmptySum = -0.0f;

// sum_i w_i x_i, divided by sum_i w_i if normalize.
struct Linear {
  static constexpr bool kUsesBase = false, kTakesDelta = false;
  static constexpr int kState = 1;
  GPTAILOR_HD static void step(float (&sum)[kState], float x, float weight, const Params&) { sum[0] += weight * x; }
  GPTAILOR_HD static float end(const float (&sum)[kState], float /*base*/, const Params& p) {
    return p.factor * (p.normalize ? sum[0] / p.divisor : sum[0]);
  }
};

// base + lambda * sum_i w_i d_i, the sum divided by sum_i w_i if normalize.
struct TaskArithmetic {
  static constexpr bool kUsesBase = true, kTakesDelta = true;
  static constexpr int kState = 1;
  GPTAILOR_HD static void step(float (&sum)[kState], float d, float weight, const Params&) { sum[0] += weight * d; }
  GPTAILOR_HD static float end(const float (&sum)[kState], float base, const Params& p) {
    return p.factor * (base + p.lambda * (p.normalize ? sum[0] / p.divisor : sum[0]));
  }
};

// Elects the sign of the weighted sum of differences, and adds up the differences that agree with it.
// The sign is known only at the end, so the sums for both signs are computed along the way.
struct Ties {
  static constexpr bool kUsesBase = true, kTakesDelta = true;
  static constexpr int kState = 5;  // sum of all; sums of the positive and negative ones; and of their weights
  GPTAILOR_HD static void step(float (&s)[kState], float delta, float weight, const Params&) {
    const float d = weight * delta;
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

// Like Ties, but with the sign of the plain sum, and weights that are never negative.
struct Sce {
  static constexpr bool kUsesBase = true, kTakesDelta = true;
  static constexpr int kState = 5;
  GPTAILOR_HD static void step(float (&s)[kState], float d, float weight, const Params&) {
    s[0] += d;
    s[1] += d > 0.0f ? weight * d : 0.0f;
    s[2] += d < 0.0f ? weight * d : 0.0f;
    s[3] += d > 0.0f ? weight : 0.0f;
    s[4] += d < 0.0f ? weight : 0.0f;
  }
  GPTAILOR_HD static float end(const float (&s)[kState], float base, const Params& p) {
    const bool positive = s[0] >= 0.0f;
    const float weights = positive ? s[3] : s[4];
    const float sum = (positive ? s[1] : s[2]) / (weights < 1e-6f ? 1e-6f : weights);
    return p.factor * (base + (is_nan(s[0]) ? s[0] : sum));
  }
};

// The mean of the differences that are not close to zero.
struct Ram {
  static constexpr bool kUsesBase = true, kTakesDelta = true;
  static constexpr int kState = 2;
  GPTAILOR_HD static void step(float (&s)[kState], float d, float, const Params& p) {
    const bool none = d <= p.epsilon && -d <= p.epsilon;  // false for NaN
    s[0] += none ? 0.0f : d;
    s[1] += none ? 0.0f : 1.0f;
  }
  GPTAILOR_HD static float end(const float (&s)[kState], float base, const Params& p) {
    return p.factor * (base + s[0] / (s[1] > 1.0f ? s[1] : 1.0f));
  }
};

// w x + (1 - w) base with w = t / |x - base|, clipped to [0, 1]: elements near each other are swapped.
struct NearSwap {
  static constexpr bool kUsesBase = true, kTakesDelta = false;
  static constexpr int kState = 1;
  GPTAILOR_HD static void step(float (&s)[kState], float x, float, const Params&) { s[0] = x; }
  GPTAILOR_HD static float end(const float (&s)[kState], float base, const Params& p) {
    const float distance = float_from_bits(magnitude_bits(base - s[0]));
    const float ratio = p.t / (distance < 1e-6f ? 1e-6f : distance);
    const float w = ratio > 1.0f ? 1.0f : ratio;
    return p.factor * (w * s[0] + (1.0f - w) * base);
  }
};

// sum_i w_i F_i x_i / sum_i w_i F_i; a step takes w_i F_i as the weight.
struct Fisher {
  static constexpr bool kUsesBase = false, kTakesDelta = false;
  static constexpr int kState = 2;
  GPTAILOR_HD static void step(float (&s)[kState], float x, float weight, const Params&) {
    s[0] += weight * x;
    s[1] += weight;
  }
  GPTAILOR_HD static float end(const float (&s)[kState], float /*base*/, const Params& p) {
    return p.factor * (s[0] / s[1]);
  }
};

// Whether Keep::magnitude keeps a difference. NaN is kept, so that it is noticed: no `low` is above kNothing.
inline constexpr uint32_t kNothing = kInfBits + 1;
GPTAILOR_HD bool keeps_magnitude(float d, uint32_t low, uint32_t high) {
  const uint32_t bits = magnitude_bits(d);
  return bits >= low && (bits <= high || bits > kInfBits);
}

// The struct of a formula.
template <Formula>
struct FormulaOf;
#define GPTAILOR_STRUCT(name, Struct) \
  template <>                         \
  struct FormulaOf<Formula::name> {   \
    using type = Struct;              \
  };
GPTAILOR_FORMULAS(GPTAILOR_STRUCT)
#undef GPTAILOR_STRUCT

#define GPTAILOR_USES_BASE(name, Struct) || (f == Formula::name && Struct::kUsesBase)
inline constexpr bool uses_base(Formula f) { return false GPTAILOR_FORMULAS(GPTAILOR_USES_BASE); }
#undef GPTAILOR_USES_BASE
#define GPTAILOR_TAKES_DELTA(name, Struct) || (f == Formula::name && Struct::kTakesDelta)
inline constexpr bool takes_delta(Formula f) { return false GPTAILOR_FORMULAS(GPTAILOR_TAKES_DELTA); }
#undef GPTAILOR_TAKES_DELTA

// The order of reductions over a whole tensor, on the CPU and on the GPU: blocks of kReduceBlock elements; within a
// block, lane j adds up the elements j, j + kLanes, ...; lanes are folded in halves; blocks are added in order.
inline constexpr int64_t kReduceBlock = 4096;
inline constexpr int kLanes = 32;

// Radix select on the GPU: histograms of 11, then 10, then 10 of a magnitude's 31 bits.
inline constexpr int kRadixPasses = 3;
inline constexpr int kRadixBuckets = 2048;
GPTAILOR_HD constexpr int radix_shift(int pass) { return pass == 0 ? 20 : pass == 1 ? 10 : 0; }
GPTAILOR_HD constexpr int radix_buckets(int pass) { return pass == 0 ? 2048 : 1024; }

}  // namespace gptailor
