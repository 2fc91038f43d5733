// One merged tensor on the CPU: what needs the whole inputs is computed once, then any slice of the output on demand.
#pragma once

#include <vector>

#include "kernels.h"

namespace gptailor {

struct MergeOptions {
  std::vector<double> weights;    // empty: all 1
  std::vector<double> densities;  // ties; empty: all 1
  double lambda = 1.0;
  double factor = 1.0;  // on the whole result
  bool normalize = false;
  double t = 0.5;
  int n_threads = 0;  // 0: as many as there are cores
};

Method method_named(const std::string& name);

// Checks the options and fills in job.params and is_copy from them: all that does not depend on the elements.
// `has_base` and job.n_sources are checked too. Throws std::invalid_argument.
void prepare(MergeJob& job, bool has_base, const MergeOptions& options);

// ties: how many elements of n a density keeps. int(density * n), at least 1.
int64_t kept_elements(double density, int64_t n_elements);

class Merger {
 public:
  // `job` has method, inputs, sizes and types. Throws std::invalid_argument, NanError.
  Merger(MergeJob job, bool has_base, const MergeOptions& options);

  const MergeJob& job() const { return job_; }

  // Writes elements [begin, begin + count) to out. The result does not depend on the number of threads, nor on how the
  // tensor is sliced. Throws NanError.
  void run(int64_t begin, int64_t count, std::byte* out) const;

 private:
  int threads_for(int64_t n_elements) const;
  void find_slerp_weights(double t);
  [[noreturn]] void raise_nan(int64_t begin, int64_t end) const;

  MergeJob job_;
  int n_threads_;
};

}  // namespace gptailor
