#include "threshold.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "parallel.h"

namespace gptailor {

namespace {
constexpr int64_t kChunk = int64_t{1} << 16;
}

bool find_thresholds(MergeJob& job, const int64_t (&keep)[kMaxSources], int n_threads) {
  std::vector<int> active;  // sources that lose something; the others keep threshold 0, which keeps everything
  for (int i = 0; i < job.n_sources; ++i) {
    job.params.thresholds[i] = 0;
    if (keep[i] < job.n_elements) active.push_back(i);
  }
  int64_t remaining[kMaxSources];
  std::copy(std::begin(keep), std::end(keep), std::begin(remaining));

  const int64_t n_chunks = (job.n_elements + kChunk - 1) / kChunk;
  std::atomic<bool> nan{false};
  for (int pass = 0; pass < kRadixPasses && !active.empty(); ++pass) {
    std::vector<std::vector<int64_t>> counts(static_cast<size_t>(n_threads));  // [thread][active source * bucket]
    parallel_for(n_chunks, n_threads, [&](int64_t chunk, int thread) {
      std::vector<int64_t>& mine = counts[static_cast<size_t>(thread)];
      mine.resize(active.size() * kRadixBuckets);
      const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, job.n_elements);
      for (size_t a = 0; a < active.size(); ++a) {
        const int i = active[a];
        uint32_t histogram[kRadixBuckets] = {};
        if (kernels().radix_count(job.sources[i], job.base, begin, end, pass, job.params.thresholds[i], histogram))
          nan = true;
        for (int b = 0; b < kRadixBuckets; ++b) mine[a * kRadixBuckets + static_cast<size_t>(b)] += histogram[b];
      }
    });
    if (nan && job.check_nan) return false;
    for (size_t a = 0; a < active.size(); ++a) {
      const int i = active[a];
      int bucket = radix_buckets(pass);
      for (int64_t count = 0; bucket > 0 && remaining[i] > 0; remaining[i] -= count) {
        --bucket;
        count = 0;
        for (const auto& mine : counts)
          if (!mine.empty()) count += mine[a * kRadixBuckets + static_cast<size_t>(bucket)];
        if (count >= remaining[i]) break;
      }
      const int bits = (pass == 0 ? 31 : radix_shift(pass - 1)) - radix_shift(pass);
      job.params.thresholds[i] = (job.params.thresholds[i] << bits) | static_cast<uint32_t>(bucket);
    }
  }
  return !nan;
}

}  // namespace gptailor
