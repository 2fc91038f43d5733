// The masks of della: each element of a row is kept at random, with a chance that grows with the rank of its magnitude.
//
// Sorting every row would take most of the time of a merge. Instead a row's magnitudes are distributed over buckets. In
// a bucket of equal magnitudes, which is common for differences of bfloat16 numbers, ranks follow from the order; in
// others the ranks of the bucket bound the chance from both sides, and the exact rank is counted only if the random
// word falls between the two.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "analysis.h"
#include "inputs.h"

namespace gptailor {

namespace {

constexpr int64_t kSortFrom = int64_t{1} << 16;  // longer rows are sorted
constexpr int64_t kBuckets = 8192;

// An element of rank r stays if its random word is below lowest + r * step. (A word is below a number exactly if it is
// below the number rounded up, so this is chance() without rounding.)
struct Chances {
  double lowest, step;
  bool keeps(uint32_t word, int64_t rank) const {
    return static_cast<double>(word) < lowest + static_cast<double>(rank) * step;
  }
};

Chances chances_for(double density, double epsilon, int64_t n) {
  constexpr double words = 4294967296.0;
  if (density <= 0.0) return {0.0, 0.0};
  if (n == 1) return {density * words, 0.0};
  return {(density - epsilon) * words, 2.0 * epsilon * words / static_cast<double>(n - 1)};
}

class Row {
 public:
  explicit Row(int64_t length)
      : bits(static_cast<size_t>(length)), words(static_cast<size_t>(length)), kept(static_cast<size_t>(length + 7)) {}

  void decide(const Chances& chances) {
    const auto n = static_cast<int64_t>(bits.size());
    const uint32_t largest = kernels().largest(bits.data(), n);
    if (n > kSortFrom || largest >= kInfBits || float_from_bits(largest) < 1e-30f) {
      decide_sorted(chances);
      return;
    }
    fill_buckets(float_from_bits(largest));
    const uint16_t* places = places_.data();
    Bucket* buckets = buckets_.data();
    for (int64_t j = 0; j < n; ++j) {
      Bucket& b = buckets[places[j]];
      const uint32_t word = words[static_cast<size_t>(j)];
      const int32_t rank = b.next;
      b.next = rank + b.equal;
      bool stays = chances.keeps(word, rank);
      if (b.equal == 0 && !stays && chances.keeps(word, b.last))
        stays = chances.keeps(word, rank + kernels().rank_at_place(bits.data(), places, n, j));
      kept[static_cast<size_t>(j)] = stays ? 1 : 0;
    }
  }

  std::vector<uint32_t> bits, words;  // of the magnitudes; random
  std::vector<uint8_t> kept;          // 0 or 1; seven more than there are elements

 private:
  struct Bucket {
    int32_t next, last;  // ranks
    int32_t equal;       // 1 if all magnitudes are equal, so the next one has the next rank
    uint32_t value;
  };

  void fill_buckets(float largest) {
    const auto n = static_cast<int64_t>(bits.size());
    const auto n_buckets = static_cast<int>(std::clamp<int64_t>(n, 16, kBuckets));
    places_.resize(bits.size());
    kernels().places(bits.data(), n, largest, n_buckets, places_.data());
    buckets_.assign(static_cast<size_t>(n_buckets), Bucket{0, 0, 1, 0});
    const uint16_t* places = places_.data();
    const uint32_t* values = bits.data();
    Bucket* buckets = buckets_.data();
    for (int64_t j = 0; j < n; ++j) {
      ++buckets[places[j]].next;
      buckets[places[j]].value = values[j];
    }
    for (int64_t j = 0; j < n; ++j)
      if (values[j] != buckets[places[j]].value) buckets[places[j]].equal = 0;
    int32_t first = 0;
    for (Bucket& b : buckets_) {
      const int32_t count = b.next;
      b.next = first;
      b.last = first + count - 1;
      first += count;
    }
  }

  void decide_sorted(const Chances& chances) {
    order_.resize(bits.size());
    std::iota(order_.begin(), order_.end(), size_t{0});
    std::stable_sort(order_.begin(), order_.end(), [&](size_t a, size_t b) { return bits[a] < bits[b]; });
    for (size_t rank = 0; rank < order_.size(); ++rank)
      kept[order_[rank]] = chances.keeps(words[order_[rank]], static_cast<int64_t>(rank)) ? 1 : 0;
  }

  std::vector<uint16_t> places_;
  std::vector<Bucket> buckets_;
  std::vector<size_t> order_;
};

// Sets n bits, starting at `begin`. Rows of other threads may share the words at both ends: those that hold the bits up
// to begin + 63, and those from begin + n - 64; the last of eight bits starting at j is j + 7.
void set_bits(const std::vector<uint8_t>& kept, int64_t n, int64_t begin, std::vector<uint64_t>& mask) {
  for (int64_t j = 0; j < n; j += 8) {
    uint64_t bytes;
    memcpy(&bytes, kept.data() + j, sizeof bytes);
    if (n - j < 8) bytes &= (uint64_t{1} << (8 * (n - j))) - 1;
    const uint64_t eight = (bytes * 0x0102040810204080u) >> 56;  // byte k to bit k
    const int64_t at = begin + j;
    uint64_t* word = mask.data() + (at >> 6);
    const int shift = static_cast<int>(at & 63);
    const auto put = [&](uint64_t* to, uint64_t value) {
      if (j < 64 || n - j < 72) __atomic_fetch_or(to, value, __ATOMIC_RELAXED);
      else *to |= value;
    };
    put(word, eight << shift);
    if (shift > 56 && (eight >> (64 - shift)) != 0) put(word + 1, eight >> (64 - shift));
  }
}

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
      row.decide(chances);
      set_bits(row.kept, job.row_length, begin, mask);
    }
  });
  return mask;
}

}  // namespace gptailor
