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
constexpr int64_t kSampleRun = 64;  // neighbours, because touching a page reads all of it

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

// A bracket that most likely contains the wanted key, from a sample of keys across the tensor.
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
  const double part = static_cast<double>(n - w.rank) / static_cast<double>(n);  // the fraction below it
  const double margin = 6.0 * std::sqrt(part * (1.0 - part) * m) + 2.0;
  const double low = std::floor(part * m - margin), high = std::ceil(part * m + margin);
  return bracket(low < 0.0 ? 0 : sample[static_cast<size_t>(low)],
                 high >= m ? kHighest : sample[static_cast<size_t>(high)]);
}

// Narrows a search by the counts of one pass.
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

// Searches that rank the same keys, which are thus computed only once.
struct Group {
  Key key;
  int source;
  std::vector<Search*> searches;
  std::vector<Bracket> brackets;
};

std::vector<Group> grouped(std::vector<Search>& searches) {
  std::vector<Group> groups;
  for (Search& s : searches) {
    if (s.found) continue;
    auto same = std::find_if(groups.begin(), groups.end(), [&](const Group& g) {
      return g.key == s.wanted->key && g.source == s.wanted->source;
    });
    if (same == groups.end()) same = groups.insert(same, Group{s.wanted->key, s.wanted->source, {}, {}});
    same->searches.push_back(&s);
    same->brackets.push_back(s.bracket);
  }
  return groups;
}

struct Counts {
  std::vector<int64_t> above, buckets;
};

// One pass over the inputs for all unfinished searches. Returns whether a key is NaN.
bool pass(const MergeJob& job, const std::vector<Group>& groups, int n_threads) {
  const int64_t per_task = task_elements(job);
  std::vector<std::vector<Counts>> counts(static_cast<size_t>(n_threads));
  std::vector<Scratch> scratch(static_cast<size_t>(n_threads));
  std::atomic<bool> nan{false};
  parallel_for((job.n_elements + per_task - 1) / per_task, threads_for(job.n_elements, n_threads),
               [&](int64_t task, int thread) {
                 std::vector<Counts>& mine = counts[static_cast<size_t>(thread)];
                 if (mine.empty())
                   for (const Group& g : groups)
                     mine.push_back({std::vector<int64_t>(g.searches.size()),
                                     std::vector<int64_t>(g.searches.size() * kBracketBuckets)});
                 const int64_t begin = task * per_task;
                 const Slice slice = scratch[static_cast<size_t>(thread)].slice(
                     job, begin, std::min(per_task, job.n_elements - begin));
                 for (size_t i = 0; i < groups.size(); ++i) {
                   const Group& g = groups[i];
                   if (kernels().count(job, slice, g.key, g.source, g.brackets.data(),
                                       static_cast<int>(g.brackets.size()), mine[i].above.data(),
                                       mine[i].buckets.data()))
                     nan = true;
                 }
               });
  for (size_t i = 0; i < groups.size(); ++i)
    for (size_t k = 0; k < groups[i].searches.size(); ++k) {
      int64_t above = 0;
      std::vector<int64_t> buckets(kBracketBuckets);
      for (const auto& mine : counts) {
        if (mine.empty()) continue;
        above += mine[i].above[k];
        for (size_t b = 0; b < kBracketBuckets; ++b) buckets[b] += mine[i].buckets[k * kBracketBuckets + b];
      }
      narrow(*groups[i].searches[k], above, buckets.data());
    }
  return nan;
}

}  // namespace

bool find_ranked(const MergeJob& job, std::vector<Wanted>& wanted, int n_threads) {
  Scratch scratch;
  std::vector<Search> searches;
  for (Wanted& w : wanted) searches.push_back({&w, guess(job, w, scratch)});
  bool nan = false;
  for (;;) {
    const std::vector<Group> groups = grouped(searches);
    if (groups.empty()) return !nan;
    nan = pass(job, groups, n_threads) || nan;
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
                 const Bracket zero{0, 0, 0};
                 int64_t above = 0;
                 const Slice slice = scratch[static_cast<size_t>(thread)].slice(
                     job, begin, std::min(per_task, job.n_elements - begin));
                 if (kernels().count(job, slice, key, source, &zero, 1, &above, buckets.data())) any_nan = true;
                 total += above;
               });
  if (any_nan) *nan = true;
  return total;
}

}  // namespace gptailor
