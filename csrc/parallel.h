// A loop over numbered tasks on a few threads that live only for the call: nothing to shut down, nothing to break in a
// forked child.
#pragma once

#include <cstdint>
#include <functional>

namespace gptailor {

// Cores that this process may use (its affinity mask, so a Slurm cpuset counts).
int available_cores();

// Calls fn(task, thread) for every task in [0, n_tasks), on at most n_threads threads, the caller's among them.
// Rethrows the first exception after all threads have ended. Every thread computes with the default floating point
// environment, whatever the caller has set (flush to zero, for one).
void parallel_for(int64_t n_tasks, int n_threads, const std::function<void(int64_t task, int thread)>& fn);

}  // namespace gptailor
