#include "ranking.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "inputs.h"
#include "parallel.h"

namespace gptailor {

namespace {

constexpr uint32_t kHighest = 0x7fffffffu;
constexpr int64_t kSampleRuns = 1024;
constexpr int64_t kSampleRun = 64;  // neighbours, since a page that is touched is read

Bracket bracket(uint32_t low, uint32_t high) {
  int shift = 0;
  while (((high - low) >> shift) >= kBracketBuckets) ++shift;
  return {low, high, shift};
}

struct Search {
  Wanted* wanted;
  Bracket bracket;
  bool found = false;
};

// Where the wanted key most likely is, from keys spread over the tensor.
Bracket guess(const MergeJob& job, const Wanted& w, Scratch& scratch) {
  const int64_t n = job.n_elements;
  if (n < 4 * kSampleRuns * kSampleRun) return bracket(0, kHighest);
  std::vector<uint32_t> sample(static_cast<size_t>(kSampleRuns * kSampleRun));
  for (int64_t run = 0; run < kSampleRuns; ++run) {
    // 128-bit: n may be near 2^60
    const auto begin = static_cast<int64_t>(static_cast<__int128>(n - kSampleRun) * run / (kSampleRuns - 1));
    kernels().keys(job, scratch.slice(job, begin, kSampleRun), w.key, w.source,
                   sample.data() + run * kSampleRun);
  }
  std::sort(sample.begin(), sample.end());
  const auto m = static_cast<double>(sample.size());
  const double part = static_cast<double>(n - w.rank) / static_cast<double>(n);  // from below
  const double margin = 6.0 * std::sqrt(part * (1.0 - part) * m) + 2.0;
  const double low = std::floor(part * m - margin), high = std::ceil(part * m + margin);
  return bracket(low < 0.0 ? 0 : sample[static_cast<size_t>(low)],
                 high >= m ? kHighest : sample[static_cast<size_t>(high)]);
}

// Goes on from what one pass has counted.
void narrow(Search& search, int64_t above, const int64_t* buckets) {
  const Bracket b = search.bracket;
  const int64_t rank = search.wanted->rank;
  if (rank <= above) {
    search.bracket = bracket(b.high + 1, kHighest);
    return;
  }
  for (int64_t bucket = (b.high - b.low) >> b.shift; bucket >= 0; --bucket) {
    above += buckets[bucket];
    if (rank > above) continue;
    const uint32_t low = b.low + (static_cast<uint32_t>(bucket) << b.shift);
    const uint32_t high = std::min(b.high, low + ((uint32_t{1} << b.shift) - 1));
    search.bracket = bracket(low, high);
    search.found = low == high;
    search.wanted->bits = low;
    return;
  }
  search.bracket = bracket(0, b.low - 1);
}

struct Counts {
  int64_t above = 0;
  std::vector<int64_t> buckets;
};

// One pass over the inputs for all searches that are under way.
void pass(const MergeJob& job, std::vector<Search*>& searches, int n_threads, bool* nan) {
  const int64_t per_task = task_elements(job);
  std::vector<std::vector<Counts>> counts(static_cast<size_t>(n_threads));
  std::vector<Scratch> scratch(static_cast<size_t>(n_threads));
  std::atomic<bool> any_nan{false};
  parallel_for((job.n_elements + per_task - 1) / per_task, threads_for(job.n_elements, n_threads),
               [&](int64_t task, int thread) {
                 std::vector<Counts>& mine = counts[static_cast<size_t>(thread)];
                 if (mine.empty()) {
                   mine.resize(searches.size());
                   for (Counts& c : mine) c.buckets.resize(kBracketBuckets);
                 }
                 const int64_t begin = task * per_task;
                 const Slice slice = scratch[static_cast<size_t>(thread)].slice(
                     job, begin, std::min(per_task, job.n_elements - begin));
                 for (size_t i = 0; i < searches.size(); ++i) {
                   const Wanted& w = *searches[i]->wanted;
                   bool here = false;
                   mine[i].above += kernels().count(job, slice, w.key, w.source, searches[i]->bracket,
                                                    mine[i].buckets.data(), &here);
                   if (here) any_nan = true;
                 }
               });
  if (any_nan) *nan = true;
  for (size_t i = 0; i < searches.size(); ++i) {
    int64_t above = 0;
    std::vector<int64_t> buckets(kBracketBuckets);
    for (const auto& mine : counts) {
      if (mine.empty()) continue;
      above += mine[i].above;
      for (size_t b = 0; b < kBracketBuckets; ++b) buckets[b] += mine[i].buckets[b];
    }
    narrow(*searches[i], above, buckets.data());
  }
}

}  // namespace

bool find_ranked(const MergeJob& job, std::vector<Wanted>& wanted, int n_threads) {
  Scratch scratch;
  std::vector<Search> searches;
  for (Wanted& w : wanted) searches.push_back({&w, guess(job, w, scratch)});
  bool nan = false;
  for (;;) {
    std::vector<Search*> open;
    for (Search& s : searches)
      if (!s.found) open.push_back(&s);
    if (open.empty()) return !nan;
    pass(job, open, n_threads, &nan);
    if (nan && job.check_nan) return false;
  }
}

int64_t count_nonzero(const MergeJob& job, Key key, int source, int n_threads, bool* nan) {
  const int64_t per_task = task_elements(job);
  std::vector<Scratch> scratch(static_cast<size_t>(n_threads));
  std::atomic<int64_t> total{0};
  std::atomic<bool> any_nan{false};
  parallel_for((job.n_elements + per_task - 1) / per_task, threads_for(job.n_elements, n_threads),
               [&](int64_t task, int thread) {
                 const int64_t begin = task * per_task;
                 std::vector<int64_t> buckets(kBracketBuckets);
                 bool here = false;
                 total += kernels().count(job,
                                          scratch[static_cast<size_t>(thread)].slice(
                                              job, begin, std::min(per_task, job.n_elements - begin)),
                                          key, source, {0, 0, 0}, buckets.data(), &here);
                 if (here) any_nan = true;
               });
  if (any_nan) *nan = true;
  return total;
}

}  // namespace gptailor
