#include "merge_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>

#include "errors.h"
#include "parallel.h"
#include "threshold.h"

namespace gptailor {

namespace {

constexpr int64_t kChunk = int64_t{1} << 16;  // elements per task; a multiple of kReduceBlock

float element(const Input& in, int64_t i) {
  if (in.dtype == DType::F32) {
    float value;
    memcpy(&value, in.data + i * 4, sizeof value);
    return value;
  }
  uint16_t bits;
  memcpy(&bits, in.data + i * 2, sizeof bits);
  return in.dtype == DType::BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

void check_list(const char* name, const std::vector<double>& values, int n_sources, double min, double max) {
  if (!values.empty() && values.size() != static_cast<size_t>(n_sources))
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(values.size()) + " values for " +
                                std::to_string(n_sources) + " sources");
  for (size_t i = 0; i < values.size(); ++i)
    if (!(values[i] >= min && values[i] <= max))
      throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(values[i]));
}

}  // namespace

Method method_named(const std::string& name) {
  if (name == "linear") return Method::linear;
  if (name == "task_arithmetic") return Method::task_arithmetic;
  if (name == "slerp") return Method::slerp;
  if (name == "ties") return Method::ties;
  throw std::invalid_argument("unknown merge method '" + name + "': known are linear, task_arithmetic, slerp, ties");
}

void prepare(MergeJob& job, bool has_base, const MergeOptions& o) {
  constexpr double big = std::numeric_limits<float>::max();
  const int n = job.n_sources;
  if (n < 1 || n > kMaxSources)
    throw std::invalid_argument("1 to " + std::to_string(kMaxSources) + " sources can be merged, not " +
                                std::to_string(n));
  if (job.method == Method::slerp && n != 2)
    throw std::invalid_argument("slerp takes exactly 2 sources, not " + std::to_string(n));
  if (uses_base(job.method) && !has_base) throw std::invalid_argument("this method needs a base");
  if (!uses_base(job.method) && has_base) throw std::invalid_argument("linear and slerp take no base");
  check_list("weights", o.weights, n, -big, big);
  check_list("densities", o.densities, n, 0.0, 1.0);
  if (!(std::abs(o.lambda) <= big)) throw std::invalid_argument("lam is " + std::to_string(o.lambda));
  if (!(std::abs(o.factor) <= big)) throw std::invalid_argument("factor is " + std::to_string(o.factor));
  if (!(std::abs(o.t) <= big)) throw std::invalid_argument("t is " + std::to_string(o.t));

  Params& p = job.params;
  p.lambda = static_cast<float>(o.lambda);
  p.factor = static_cast<float>(o.factor);
  p.normalize = o.normalize && job.method != Method::slerp;
  float sum = 0.0f;
  for (int i = 0; i < n; ++i) {
    p.weights[i] = o.weights.empty() ? 1.0f : static_cast<float>(o.weights[static_cast<size_t>(i)]);
    sum += p.weights[i];
  }
  const bool zero_sum = std::abs(sum) < 1e-8f;
  if (job.method == Method::linear && p.normalize && zero_sum)
    throw std::invalid_argument("the weights add up to zero, so they cannot be normalised");
  p.divisor = zero_sum ? 1.0f : sum;
  job.is_copy = job.method == Method::linear && n == 1 && p.weights[0] == 1.0f && !p.normalize && p.factor == 1.0f;
}

int64_t kept_elements(double density, int64_t n) {
  return std::clamp<int64_t>(static_cast<int64_t>(density * static_cast<double>(n)), 1, n);
}

Merger::Merger(MergeJob job, bool has_base, const MergeOptions& options)
    : job_(job), n_threads_(options.n_threads > 0 ? options.n_threads : available_cores()) {
  if (options.n_threads < 0) throw std::invalid_argument("threads is negative");
  prepare(job_, has_base, options);
  if (job_.n_elements == 0) return;
  if (job_.method == Method::slerp) find_slerp_weights(options.t);
  if (job_.method == Method::ties) {
    int64_t keep[kMaxSources] = {};
    for (int i = 0; i < job_.n_sources; ++i)
      keep[i] = options.densities.empty() ? job_.n_elements
                                          : kept_elements(options.densities[static_cast<size_t>(i)], job_.n_elements);
    if (!find_thresholds(job_, keep, threads_for(job_.n_elements)) && job_.check_nan) raise_nan(0, job_.n_elements);
  }
}

// Starting a thread costs about as much as merging a few ten thousand elements.
int Merger::threads_for(int64_t n_elements) const {
  return static_cast<int>(std::clamp<int64_t>(n_elements / kChunk, 1, n_threads_));
}

void Merger::find_slerp_weights(double t) {
  const int64_t n_blocks = (job_.n_elements + kReduceBlock - 1) / kReduceBlock;
  constexpr int64_t kBlocksPerTask = kChunk / kReduceBlock;
  std::vector<DotSums> blocks(static_cast<size_t>(n_blocks));
  parallel_for((n_blocks + kBlocksPerTask - 1) / kBlocksPerTask, threads_for(job_.n_elements), [&](int64_t task, int) {
    for (int64_t b = task * kBlocksPerTask; b < std::min(n_blocks, (task + 1) * kBlocksPerTask); ++b)
      blocks[static_cast<size_t>(b)] = kernels().dot(job_.sources[0], job_.sources[1], b * kReduceBlock,
                                                     std::min(job_.n_elements, (b + 1) * kReduceBlock));
  });
  DotSums total{0.0, 0.0, 0.0};
  for (const DotSums& block : blocks) {
    total.norm0_sq += block.norm0_sq;
    total.norm1_sq += block.norm1_sq;
    total.dot += block.dot;
  }
  slerp_weights(total.norm0_sq, total.norm1_sq, total.dot, t, job_.params.weights);
  // Squares of float32 cannot overflow a double: only an infinity or a NaN among the inputs gets here.
  if (job_.check_nan && !std::isfinite(total.norm0_sq + total.norm1_sq)) {
    for (int64_t i = 0; i < job_.n_elements; ++i)
      for (int s = 0; s < 2; ++s)
        if (!std::isfinite(element(job_.sources[s], i)))
          throw NanError("input " + std::to_string(s) +
                             (is_nan(element(job_.sources[s], i)) ? " is NaN" : " is infinite") + " at element " +
                             std::to_string(i) + ", so that the angle of slerp is not a number",
                         s, i);
  }
}

void Merger::run(int64_t begin, int64_t count, std::byte* out) const {
  const int64_t out_bytes = mergeable_bytes(job_.out_dtype);
  const int64_t n_chunks = (count + kChunk - 1) / kChunk;
  std::atomic<int64_t> first_nan{n_chunks};
  parallel_for(n_chunks, threads_for(count), [&](int64_t chunk, int) {
    if (chunk > first_nan) return;  // never skips a chunk before the first one with a NaN
    const int64_t offset = chunk * kChunk;
    const int64_t end = std::min(offset + kChunk, count);
    if (!kernels().merge(job_, begin + offset, begin + end, out + offset * out_bytes)) return;
    for (int64_t known = first_nan; chunk < known && !first_nan.compare_exchange_weak(known, chunk);) {
    }
  });
  if (first_nan < n_chunks) raise_nan(begin + first_nan * kChunk, begin + std::min(count, (first_nan + 1) * kChunk));
}

void Merger::raise_nan(int64_t begin, int64_t end) const {
  MergeJob one = job_;
  one.out_dtype = DType::F32;
  float results[1];
  for (int64_t i = begin; i < end; ++i) {
    const std::string where = " at element " + std::to_string(i);
    for (int s = 0; s < job_.n_sources; ++s)
      if (is_nan(element(job_.sources[s], i)))
        throw NanError("input " + std::to_string(s) + " is NaN" + where, s, i);
    if (uses_base(job_.method) && is_nan(element(job_.base, i)))
      throw NanError("base is NaN" + where, NanError::kBase, i);
    if (kernels().merge(one, i, i + 1, reinterpret_cast<std::byte*>(results)))
      throw NanError("infinite inputs make the result not a number (NaN)" + where, NanError::kResult, i);
  }
  throw NanError("the result is not a number (NaN)", NanError::kResult, begin);
}

}  // namespace gptailor
