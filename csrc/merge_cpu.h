// One merged tensor on the CPU: the whole inputs are analysed once, then any slice of the output is computed on demand.
#pragma once

#include <functional>
#include <vector>

#include "analysis.h"

namespace gptailor {

class Merger {
 public:
  // `job` has inputs, sizes and types. Throws std::invalid_argument, NanError, OsError.
  Merger(MergeJob job, const Method& method, int n_threads);

  const MergeJob& job() const { return job_; }

  // Writes elements [begin, begin + count) to out. The result does not depend on the number of threads, nor on how the
  // tensor is sliced. Throws NanError, RangeError, OsError.
  void run(int64_t begin, int64_t count, std::byte* out) const;

  // The same, to a file at `offset`: each thread writes what it has computed while the others compute.
  void write(int64_t begin, int64_t count, int fd, int64_t offset) const;

 private:
  void merge_tasks(int64_t begin, int64_t count, int64_t per_task,
                   const std::function<std::byte*(int64_t first, int64_t n, int thread)>& room,
                   const std::function<void(int64_t first, int64_t n, int thread)>& done) const;
  void check_intact() const;
  // Throws NanError or RangeError: looks for the piece of [begin, end) in which the kernel finds something.
  [[noreturn]] void raise_found(int64_t begin, int64_t end) const;
  [[noreturn]] void raise_overflow(int64_t begin, int64_t end) const;
  // Throws NanError: looks for NaN and infinity in [begin, end). `analysed`: the job can be run.
  [[noreturn]] void raise_nan(int64_t begin, int64_t end, bool analysed) const;

  MergeJob job_;
  Analysed analysed_;
  int n_threads_;
};

}  // namespace gptailor
