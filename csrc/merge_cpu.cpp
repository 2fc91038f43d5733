#include "merge_cpu.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>

#include "byte_reader.h"
#include "errors.h"
#include "inputs.h"
#include "parallel.h"

namespace gptailor {

namespace {

constexpr int64_t kWriteTask = int64_t{1} << 19;

void write_all(int fd, const std::byte* data, int64_t n_bytes, int64_t offset) {
  while (n_bytes > 0) {
    const ssize_t written = pwrite(fd, data, static_cast<size_t>(n_bytes), offset);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) throw OsError(written < 0 ? errno : EIO, "writing failed");
    data += written, offset += written, n_bytes -= written;
  }
}

constexpr int kMostThreads = 1024;  // each has its own scratch memory

}  // namespace

Merger::Merger(MergeJob job, const Method& method, int n_threads)
    : job_(job), n_threads_(n_threads > 0 ? std::min(n_threads, kMostThreads) : available_cores()) {
  if (n_threads < 0) throw std::invalid_argument("threads is negative");
  job_.formula = method.formula;
  job_.keep = method.keep;
  job_.params = method.params;
  job_.is_copy = method.is_copy;
  if (job_.formula == Formula::fisher) job_.weights_by = Weights::elements;
  if (job_.n_elements == 0) return;
  bool ok;
  try {
    ok = analyse(job_, method, n_threads_, analysed_);
  } catch (const std::invalid_argument&) {
    check_intact();  // a changed file is the more likely reason
    throw;
  }
  check_intact();
  if (!ok) raise_nan(0, job_.n_elements, false);
}

void Merger::check_intact() const {
  for (int s = 0; s < job_.n_sources; ++s)
    if (job_.sources[s].reader != nullptr) job_.sources[s].reader->check_intact();
  for (int s = 0; s < job_.n_sources; ++s)
    if (job_.statistics[s].reader != nullptr) job_.statistics[s].reader->check_intact();
  if (job_.base.reader != nullptr) job_.base.reader->check_intact();
}

void Merger::merge_tasks(int64_t begin, int64_t count, int64_t per_task,
                         const std::function<std::byte*(int64_t, int64_t, int)>& room,
                         const std::function<void(int64_t, int64_t, int)>& done) const {
  const int64_t n_tasks = (count + per_task - 1) / per_task, piece = task_elements(job_);
  const int64_t out_bytes = mergeable_bytes(job_.out_dtype);
  std::atomic<int64_t> first_bad{n_tasks};
  std::vector<Scratch> scratch(static_cast<size_t>(n_threads_));
  parallel_for(n_tasks, threads_for(count, n_threads_), [&](int64_t task, int thread) {
    if (task > first_bad) return;  // never skips a task before the first one in which something is found
    const int64_t first = task * per_task, n = std::min(per_task, count - first);
    std::byte* out = room(first, n, thread);
    unsigned found = 0;
    for (int64_t i = 0; i < n; i += piece) {
      const Slice slice =
          scratch[static_cast<size_t>(thread)].slice(job_, begin + first + i, std::min(piece, n - i));
      found |= kernels().merge(job_, slice, out + i * out_bytes);
    }
    if (found != 0)
      for (int64_t known = first_bad; task < known && !first_bad.compare_exchange_weak(known, task);) {
      }
    else
      done(first, n, thread);
  });
  check_intact();
  if (first_bad < n_tasks)
    raise_found(begin + first_bad * per_task, begin + std::min(count, (first_bad + 1) * per_task));
}

void Merger::run(int64_t begin, int64_t count, std::byte* out) const {
  const int64_t out_bytes = mergeable_bytes(job_.out_dtype);
  merge_tasks(
      begin, count, task_elements(job_), [&](int64_t first, int64_t, int) { return out + first * out_bytes; },
      [](int64_t, int64_t, int) {});
}

void Merger::write(int64_t begin, int64_t count, int fd, int64_t offset) const {
  const int64_t out_bytes = mergeable_bytes(job_.out_dtype);
  std::vector<std::unique_ptr<std::byte[]>> buffers(static_cast<size_t>(n_threads_));
  merge_tasks(
      begin, count, kWriteTask,
      [&](int64_t, int64_t, int thread) {
        auto& buffer = buffers[static_cast<size_t>(thread)];
        if (!buffer) buffer.reset(new std::byte[static_cast<size_t>(std::min(count, kWriteTask) * out_bytes)]);
        return buffer.get();
      },
      [&](int64_t first, int64_t n, int thread) {
        write_all(fd, buffers[static_cast<size_t>(thread)].get(), n * out_bytes, offset + first * out_bytes);
      });
}

void Merger::raise_found(int64_t begin, int64_t end) const {
  const int64_t piece = task_elements(job_);
  Scratch scratch;
  std::vector<std::byte> out(static_cast<size_t>(std::min(piece, end - begin) * mergeable_bytes(job_.out_dtype)));
  for (int64_t i = begin; i < end; i += piece) {
    const int64_t last = std::min(end, i + piece);
    const unsigned found = kernels().merge(job_, scratch.slice(job_, i, last - i), out.data());
    if (found & kFoundNan) raise_nan(i, last, true);
    if (found & kFoundOverflow) raise_overflow(i, last);
  }
  check_intact();
  throw NanError("an input changed", NanError::kResult, begin);
}

void Merger::raise_overflow(int64_t begin, int64_t end) const {
  Scratch scratch;
  std::vector<float> x(static_cast<size_t>(end - begin));
  MergeJob one = job_;
  one.out_dtype = DType::F32;
  kernels().merge(one, scratch.slice(job_, begin, end - begin), reinterpret_cast<std::byte*>(x.data()));
  size_t j = 0;
  while (j + 1 < x.size() && !overflows_f16(x[j])) ++j;
  char value[32];
  std::snprintf(value, sizeof value, "%g", static_cast<double>(x[j]));
  const int64_t element = begin + static_cast<int64_t>(j);
  throw RangeError("element " + std::to_string(element) + " is " + value + ", but the largest number in float16 is 65504",
                   job_.is_copy, element);
}

void Merger::raise_nan(int64_t begin, int64_t end, bool analysed) const {
  const int64_t piece = task_elements(job_);
  Scratch scratch;
  std::vector<float> x(static_cast<size_t>(std::min(piece, end - begin)));
  struct Place {
    int64_t element = -1;
    int source = 0;
    void offer(int64_t at, int of) {
      if (element < 0 || at < element) element = at, source = of;
    }
  } nan, infinite, result;
  const auto look = [&](const std::byte* data, DType dtype, int source, int64_t first, int64_t n) {
    kernels().load(data, dtype, n, x.data());
    for (int64_t i = 0; i < n; ++i) {
      const float value = x[static_cast<size_t>(i)];
      if (!std::isfinite(value)) (std::isnan(value) ? nan : infinite).offer(first + i, source);
    }
  };
  MergeJob one = job_;
  one.out_dtype = DType::F32;
  for (int64_t i = begin; i < end && nan.element < 0; i += piece) {
    const Slice slice = scratch.slice(job_, i, std::min(piece, end - i));
    for (int s = 0; s < job_.n_sources; ++s) look(slice.sources[s], job_.sources[s].dtype, s, i, slice.n);
    if (job_.has_base) look(slice.base, job_.base.dtype, NanError::kBase, i, slice.n);
    for (int s = 0; s < job_.n_sources && job_.weights_by == Weights::elements; ++s)
      look(slice.statistics[s], job_.statistics[s].dtype, kMaxSources + s, i, slice.n);
    if (!analysed || result.element >= 0 ||
        !(kernels().merge(one, slice, reinterpret_cast<std::byte*>(x.data())) & kFoundNan))
      continue;
    for (int64_t j = 0; j < slice.n && result.element < 0; ++j)
      if (std::isnan(x[static_cast<size_t>(j)])) result.offer(i + j, NanError::kResult);
  }
  const auto fail = [](const Place& place, const std::string& what) {
    const bool statistics = place.source >= kMaxSources;
    const int source = statistics ? place.source - kMaxSources : place.source;
    const std::string name = source == NanError::kBase ? "base"
                             : statistics              ? "the statistics of input " + std::to_string(source)
                             : source == NanError::kResult ? "the result"
                                                           : "input " + std::to_string(source);
    throw NanError(name + (statistics ? " are " : " is ") + what + " at element " + std::to_string(place.element), source,
                   place.element);
  };
  if (nan.element >= 0) fail(nan, "NaN");
  if (result.element >= 0)
    fail(result, infinite.element >= 0 ? "not a number (NaN), because of infinite inputs," : "not a number (NaN)");
  if (infinite.element >= 0) fail(infinite, "infinite, so the result would not be a number (NaN),");
  throw NanError("the result is not a number (NaN)", NanError::kResult, begin);
}

}  // namespace gptailor
