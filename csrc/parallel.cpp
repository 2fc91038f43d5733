#include "parallel.h"

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace gptailor {

namespace {

struct DefaultFloatEnvironment {
  DefaultFloatEnvironment() {
    std::fegetenv(&saved);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved); }
  std::fenv_t saved;
};

}  // namespace

int available_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void parallel_for(int64_t n_tasks, int n_threads, const std::function<void(int64_t, int)>& fn) {
  n_threads = static_cast<int>(std::clamp<int64_t>(n_threads, 1, std::max<int64_t>(1, n_tasks)));
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&](int thread) {
    const DefaultFloatEnvironment environment;
    try {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n_tasks;) fn(task, thread);
    } catch (...) {
      next.store(n_tasks, std::memory_order_relaxed);
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(n_threads));
  for (int t = 1; t < n_threads; ++t) {
    try {
      threads.emplace_back(work, t);
    } catch (const std::exception&) {
      break;  // a limit on processes or memory was reached: fewer threads give the same result
    }
  }
  work(0);
  for (std::thread& thread : threads) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace gptailor
