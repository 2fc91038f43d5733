// The masks of della: every element of a row draws, and its chance grows with the rank of its magnitude in the row.
//
// Sorting every row would take most of the time of a merge, and most draws do not need a rank: a row's magnitudes are
// spread over buckets, and the bucket's ranks bound the chance from both sides. Only where the draw falls between the
// two is the rank counted out.
#include <algorithm>
#include <cmath>

#include "analysis.h"
#include "inputs.h"

namespace gptailor {

namespace {

constexpr int64_t kSortFrom = int64_t{1} << 16;  // longer rows are sorted
constexpr int64_t kBuckets = 4096;

struct Chances {
  double lowest, step;  // chance of rank r is lowest + r * step, in parts of 1
  uint64_t of(int64_t rank) const { return chance(lowest + static_cast<double>(rank) * step); }
};

Chances chances_for(double density, double epsilon, int64_t n) {
  if (density <= 0.0) return {0.0, 0.0};
  if (n == 1) return {density, 0.0};
  return {density - epsilon, 2.0 * epsilon / static_cast<double>(n - 1)};
}

class Row {
 public:
  Row(int64_t length) : bits(static_cast<size_t>(length)), words(static_cast<size_t>(length)) {}

  // Calls keep(j) for each element that stays.
  template <class Keep>
  void decide(const Chances& chances, Keep keep) {
    const auto n = static_cast<int64_t>(bits.size());
    const uint32_t largest = *std::max_element(bits.begin(), bits.end());
    const float most = float_from_bits(largest);
    if (n > kSortFrom || largest >= kInfBits || most < 1e-30f) {
      decide_sorted(chances, keep);
      return;
    }
    const int64_t n_buckets = std::clamp<int64_t>(n, 16, kBuckets);
    const float scale = static_cast<float>(n_buckets - 2) / most;
    buckets_.resize(bits.size());
    for (int64_t j = 0; j < n; ++j) {
      const auto b = static_cast<int32_t>(float_from_bits(bits[j]) * scale);
      const int32_t bucket = 1 + std::min(b, static_cast<int32_t>(n_buckets - 2));
      buckets_[j] = static_cast<uint16_t>(bits[j] == 0 ? 0 : bucket);
    }
    first_.assign(static_cast<size_t>(n_buckets) + 1, 0);
    for (int64_t j = 0; j < n; ++j) ++first_[buckets_[j] + 1u];
    for (size_t b = 1; b < first_.size(); ++b) first_[b] += first_[b - 1];

    const uint64_t least = chances.of(0), best = chances.of(n - 1);
    int32_t zeros = 0;
    for (int64_t j = 0; j < n; ++j) {
      const uint32_t b = buckets_[j];
      const int64_t low = b == 0 ? zeros++ : first_[b];  // zeros are in order already
      if (words[j] >= best) continue;
      if (words[j] >= least && words[j] >= chances.of(low)) {
        const int64_t high = b == 0 ? low : first_[b + 1] - 1;
        if (low == high || words[j] >= chances.of(high) || words[j] >= chances.of(rank_of(j))) continue;
      }
      keep(j);
    }
  }

  std::vector<uint32_t> bits, words;  // of the magnitudes; random

 private:
  int64_t rank_of(int64_t element) const {
    const uint16_t bucket = buckets_[element];
    const uint32_t own = bits[element];
    const auto n = static_cast<int64_t>(bits.size());
    int64_t below = first_[bucket];
    for (int64_t j = 0; j < n; ++j)
      below += buckets_[j] == bucket && (bits[j] < own || (bits[j] == own && j < element)) ? 1 : 0;
    return below;
  }

  template <class Keep>
  void decide_sorted(const Chances& chances, Keep keep) {
    order_.resize(bits.size());
    for (size_t j = 0; j < order_.size(); ++j) order_[j] = static_cast<int64_t>(j);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return bits[a] < bits[b]; });
    for (size_t rank = 0; rank < order_.size(); ++rank)
      if (words[order_[rank]] < chances.of(static_cast<int64_t>(rank))) keep(order_[rank]);
  }

  std::vector<uint16_t> buckets_;
  std::vector<int32_t> first_;
  std::vector<int64_t> order_;
};

}  // namespace

std::vector<uint64_t> ranked_mask(const MergeJob& job, int source, double density, double epsilon, int n_threads) {
  std::vector<uint64_t> mask(static_cast<size_t>((job.n_elements + 63) / 64));
  std::vector<Scratch> scratch(static_cast<size_t>(n_threads));
  const Chances chances = chances_for(density, epsilon, job.row_length);
  for_rows(job, n_threads, [&](int64_t first_row, int64_t n_rows, int thread) {
    Row row(job.row_length);
    for (int64_t r = first_row; r < first_row + n_rows; ++r) {
      const int64_t begin = r * job.row_length;
      const Slice slice = scratch[static_cast<size_t>(thread)].slice(job, begin, job.row_length);
      kernels().keys(job, slice, Key::magnitude, source, row.bits.data());
      kernels().random(job.params.key, source, begin, job.row_length, row.words.data());
      int64_t word = begin >> 6;
      uint64_t gathered = 0;
      const auto flush = [&] {  // rows of other threads may end in the same word
        if (gathered != 0) __atomic_fetch_or(&mask[static_cast<size_t>(word)], gathered, __ATOMIC_RELAXED);
        gathered = 0;
      };
      row.decide(chances, [&](int64_t j) {
        const int64_t e = begin + j;
        if (e >> 6 != word) {
          flush();
          word = e >> 6;
        }
        gathered |= uint64_t{1} << (e & 63);
      });
      flush();
    }
  });
  return mask;
}

}  // namespace gptailor
