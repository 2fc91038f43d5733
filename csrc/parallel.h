// A loop over numbered tasks on a few threads that live only for the call, so there is nothing to shut down, and
// nothing that could break in a forked child.
#pragma once

#include <cstdint>
#include <functional>

namespace gptailor {

// The number of cores that this process may use (its affinity mask, so a Slurm cpuset is respected).
int available_cores();

// Calls fn(task, thread) for every task in [0, n_tasks), on at most n_threads threads, including the caller's. Rethrows
// the first exception after all threads have ended. Every thread uses the default floating-point environment, whatever
// the caller has set (flush to zero, for example).
void parallel_for(int64_t n_tasks, int n_threads, const std::function<void(int64_t task, int thread)>& fn);

}  // namespace gptailor
