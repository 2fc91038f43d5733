// Iterates over the inputs of a merge in pieces: mapped ones are used in place, others are read into a buffer.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "kernels.h"

namespace gptailor {

// Buffers for one piece of every input that is not mapped; one object per thread.
class Scratch {
 public:
  // The elements [begin, begin + n) of all inputs of the job; valid until the next call. Throws OsError.
  Slice slice(const MergeJob& job, int64_t begin, int64_t n);

 private:
  const std::byte* piece(const Input& input, int64_t begin, int64_t n, size_t slot);
  std::vector<std::unique_ptr<std::byte[]>> buffers_;
  std::vector<int64_t> sizes_;
};

// Elements per task: large enough to be worth a system call if any are needed. A multiple of kReduceBlock.
int64_t task_elements(const MergeJob& job);

// A task for each piece of whole rows, of about task_elements: fn(first_row, n_rows, thread).
void for_rows(const MergeJob& job, int n_threads, const std::function<void(int64_t, int64_t, int)>& fn);

// Starting a thread costs about as much as merging a few tens of thousands of elements.
int threads_for(int64_t n_elements, int n_threads);

}  // namespace gptailor
