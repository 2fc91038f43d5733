#include "inputs.h"

#include <algorithm>

#include "byte_reader.h"
#include "parallel.h"

namespace gptailor {

namespace {

constexpr int64_t kMappedTask = int64_t{1} << 16;
constexpr int64_t kReadTask = int64_t{1} << 20;

bool is_read(const Input& input) { return input.data == nullptr && input.reader != nullptr; }

}  // namespace

const std::byte* Scratch::piece(const Input& input, int64_t begin, int64_t n, size_t slot) {
  const int64_t size = mergeable_bytes(input.dtype);
  if (!is_read(input)) return input.data == nullptr ? nullptr : input.data + begin * size;
  if (buffers_.size() <= slot) {
    buffers_.resize(slot + 1);
    sizes_.resize(slot + 1);
  }
  if (sizes_[slot] < n * size) {
    buffers_[slot].reset();
    buffers_[slot].reset(new std::byte[static_cast<size_t>(n * size)]);
    sizes_[slot] = n * size;
  }
  input.reader->read(input.reader_offset + begin * size, n * size, buffers_[slot].get());
  return buffers_[slot].get();
}

Slice Scratch::slice(const MergeJob& job, int64_t begin, int64_t n) {
  Slice slice;
  slice.begin = begin;
  slice.n = n;
  for (int s = 0; s < job.n_sources; ++s)
    slice.sources[s] = piece(job.sources[s], begin, n, static_cast<size_t>(s));
  for (int s = 0; s < job.n_sources && job.weights_by == Weights::elements; ++s)
    slice.statistics[s] = piece(job.statistics[s], begin, n, static_cast<size_t>(kMaxSources + 1 + s));
  if (job.has_base) slice.base = piece(job.base, begin, n, kMaxSources);
  return slice;
}

int64_t task_elements(const MergeJob& job) {
  bool read = is_read(job.base);
  for (int s = 0; s < job.n_sources; ++s) read = read || is_read(job.sources[s]) || is_read(job.statistics[s]);
  return read ? kReadTask : kMappedTask;
}

void for_rows(const MergeJob& job, int n_threads, const std::function<void(int64_t, int64_t, int)>& fn) {
  const int64_t n_rows = job.n_elements / job.row_length;
  const int64_t per_task = std::max<int64_t>(1, task_elements(job) / job.row_length);
  parallel_for((n_rows + per_task - 1) / per_task, threads_for(job.n_elements, n_threads),
               [&](int64_t task, int thread) {
                 fn(task * per_task, std::min(per_task, n_rows - task * per_task), thread);
               });
}

int threads_for(int64_t n_elements, int n_threads) {
  return static_cast<int>(std::clamp<int64_t>(n_elements / kMappedTask, 1, n_threads));
}

}  // namespace gptailor
