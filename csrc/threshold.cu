// Finds the exact k-th largest magnitude of source - base, for a list of tensors: a sample gives a likely bracket, and
// a pass over the inputs sorts the few values within it into buckets. If all values in the right bucket are equal,
// which is common for 16-bit inputs, that is the answer; else the next pass looks into it. ranking.cpp does the same on
// the CPU.
#include <algorithm>

#include "cuda_common.cuh"

namespace gptailor {

namespace {

constexpr uint32_t kHighest = 0x7fffffffu;
constexpr int kSample = 8192;
constexpr int kRun = 8;  // neighbours, which are fetched from memory together
// The most that any bracket needs: a miss, then buckets of at most 2^20, 2^9 and 1 values.
constexpr int kPasses = 4;

__device__ Search narrowed(int64_t rank, uint32_t low, uint32_t high) {
  int shift = 0;
  while (((high - low) >> shift) >= static_cast<uint32_t>(kBuckets)) ++shift;
  return {rank, low, high, shift};
}

struct Picked {
  int bucket;        // -1: there are fewer than `rank`
  long long before;  // in higher buckets
};

// The bucket with the rank-th largest, counting down from the highest bucket. All threads call it with the same
// arguments and get the same answer.
template <class Count>
__device__ Picked pick(const Count* counts, int64_t rank) {
  constexpr int kEach = kBuckets / kThreads;
  __shared__ long long sums[kThreads];
  __shared__ Picked picked;
  const int t = threadIdx.x;
  const int top = kBuckets - 1 - t * kEach;
  long long mine = 0;
  for (int k = 0; k < kEach; ++k) mine += static_cast<long long>(counts[top - k]);
  sums[t] = mine;
  if (t == 0) picked = {-1, 0};
  __syncthreads();
  for (int step = 1; step < kThreads; step *= 2) {
    const long long left = t >= step ? sums[t - step] : 0;
    __syncthreads();
    sums[t] += left;
    __syncthreads();
  }
  long long before = sums[t] - mine;
  if (before < rank && rank <= sums[t]) {  // one thread only
    int bucket = top;
    while (before + static_cast<long long>(counts[bucket]) < rank) before += static_cast<long long>(counts[bucket--]);
    picked = {bucket, before};
  }
  __syncthreads();
  const Picked result = picked;
  __syncthreads();  // before the next call writes
  return result;
}

// The rank-th largest of n keys in shared memory, 1 <= rank <= n, by radix select. All threads call it.
__device__ uint32_t select(const uint32_t* keys, int n, int64_t rank) {
  __shared__ unsigned counts[kBuckets];
  uint32_t prefix = 0;
  for (int pass = 0; pass < kRadixPasses; ++pass) {
    for (int b = threadIdx.x; b < kBuckets; b += kThreads) counts[b] = 0;
    __syncthreads();
    const int shift = radix_shift(pass), above = pass == 0 ? 31 : radix_shift(pass - 1);
    const uint32_t mask = static_cast<uint32_t>(radix_buckets(pass)) - 1;
    for (int i = threadIdx.x; i < n; i += kThreads)
      if (pass == 0 || (keys[i] >> above) == prefix) atomicAdd(&counts[(keys[i] >> shift) & mask], 1u);
    __syncthreads();
    const Picked found = pick(counts, rank);
    rank -= found.before;
    prefix = (prefix << (above - shift)) | static_cast<uint32_t>(found.bucket);
  }
  return prefix;
}

__device__ uint32_t key_at(const DeviceTensor& row, int source, int64_t i) {
  float x[1], base[1];
  load(row.sources[source], row.source_dtypes[source], i, x);
  load(row.base, row.base_dtype, i, base);
  return magnitude_bits(x[0] - base[0]);
}

// Called by one thread of the block.
__device__ void resolve(Search& search, uint32_t bits, int which, int source, Reduced& reduced, int* unresolved) {
  (which == 0 ? reduced.low : reduced.high)[source] = bits;
  search.rank = 0;
  atomicAdd(unresolved, -1);
}

// One thread block per search: a first bracket, and an empty histogram. Small tensors are their own sample.
__global__ void __launch_bounds__(kThreads) sample_keys(const DeviceTensor* __restrict__ rows, int n_sources,
                                                        int n_which, Search* searches, Histogram* histograms,
                                                        Reduced* reduced, int* unresolved) {
  __shared__ uint32_t keys[kSample];
  Search& search = searches[blockIdx.x];
  const int64_t rank = search.rank;
  if (rank == 0) return;
  const int r = static_cast<int>(blockIdx.x) / (n_sources * n_which);
  const int item = static_cast<int>(blockIdx.x) % (n_sources * n_which);
  const int source = item / n_which, which = item % n_which;
  const DeviceTensor& row = rows[r];
  const int64_t n = row.n_elements;
  if (n <= kSample) {
    for (int i = threadIdx.x; i < n; i += kThreads) keys[i] = key_at(row, source, i);
    __syncthreads();
    const uint32_t bits = select(keys, static_cast<int>(n), rank);
    if (threadIdx.x == 0) resolve(search, bits, which, source, reduced[r], unresolved);
    return;
  }
  // Runs at even distances, each shifted by a hash of its number, so that the rows of a matrix do not bias the sample.
  constexpr int kRuns = kSample / kRun;
  const int64_t distance = (n - kRun) / (kRuns - 1);
  for (int j = threadIdx.x; j < kSample; j += kThreads) {
    const int run = j / kRun;
    const uint32_t hash = (static_cast<uint32_t>(run) * 2654435761u) >> 8;
    const int64_t shift = run == kRuns - 1 ? 0 : static_cast<int64_t>(hash) % distance;
    keys[j] = key_at(row, source, distance * run + shift + j % kRun);
  }
  __syncthreads();
  const double part = static_cast<double>(rank) / static_cast<double>(n);
  const double margin = 5.0 * sqrt(part * (1.0 - part) * kSample) + 2.0;
  const int64_t first = static_cast<int64_t>(floor(part * kSample - margin));
  const int64_t last = static_cast<int64_t>(ceil(part * kSample + margin));
  uint32_t low = 0, high = kHighest;
  if (first >= 1) high = select(keys, kSample, first);
  if (last <= kSample) low = select(keys, kSample, last);
  if (threadIdx.x == 0) search = narrowed(rank, low, high);
  Histogram& histogram = histograms[blockIdx.x];
  for (int b = threadIdx.x; b < kBuckets; b += kThreads)
    histogram.counts[b] = 0, histogram.smallest[b] = ~0u, histogram.largest[b] = 0;
  if (threadIdx.x == 0) histogram.above = 0;
}

// One pass. A thread block processes consecutive tiles for one source, and adds its histogram to the search's when it
// reaches another tensor. Blocks for the same tiles of other sources are adjacent, so that they find the base in the
// cache.
__global__ void __launch_bounds__(kThreads) count_keys(const DeviceTensor* __restrict__ rows, int n_rows,
                                                       int64_t n_tiles, int n_sources, int n_which,
                                                       const Search* __restrict__ searches, Histogram* histograms,
                                                       const int* unresolved) {
  if (*unresolved == 0) return;
  __shared__ unsigned counts[kBuckets];
  __shared__ uint32_t smallest[kBuckets], largest[kBuckets];
  for (int b = threadIdx.x; b < kBuckets; b += kThreads) counts[b] = 0, smallest[b] = ~0u, largest[b] = 0;
  __syncthreads();

  const int n_items = n_sources * n_which;
  const int item = static_cast<int>(blockIdx.x) % n_items;
  const int source = item / n_which;
  const int64_t n_walks = gridDim.x / n_items, walk = blockIdx.x / n_items;
  const int64_t per_walk = (n_tiles + n_walks - 1) / n_walks;
  const int64_t first = walk * per_walk, last = min(first + per_walk, n_tiles);
  unsigned long long above = 0;
  for (int64_t tile = first; tile < last; ++tile) {
    const int r = find_row(rows, n_rows, &DeviceTensor::first_tile, tile);
    const DeviceTensor& row = rows[r];
    const int64_t number = static_cast<int64_t>(r) * n_items + item;
    const Search search = searches[number];
    if (search.rank == 0) continue;
    const int64_t begin = (tile - row.first_tile) * kTile, end = min(begin + kTile, row.n_elements);
    const auto count = [&](uint32_t key) {
      if (key > search.high) ++above;
      if (key < search.low || key > search.high) return;
      const uint32_t bucket = (key - search.low) >> search.shift;
      atomicAdd(&counts[bucket], 1u);
      atomicMin(&smallest[bucket], key);
      atomicMax(&largest[bucket], key);
    };
    const int64_t vector_end = row.aligned ? end - (end - begin) % kVector : begin;
    for (int64_t i = begin + threadIdx.x * kVector; i < vector_end; i += kThreads * kVector) {
      float x[kVector], base[kVector];
      load(row.sources[source], row.source_dtypes[source], i, x);
      load(row.base, row.base_dtype, i, base);
#pragma unroll
      for (int e = 0; e < kVector; ++e) count(magnitude_bits(x[e] - base[e]));
    }
    for (int64_t i = vector_end + threadIdx.x; i < end; i += kThreads) count(key_at(row, source, i));
    if (tile + 1 < last && end < row.n_elements) continue;
    __syncthreads();
    Histogram& histogram = histograms[number];
    if (above != 0) atomicAdd(&histogram.above, above);
    above = 0;
    for (int b = threadIdx.x; b < kBuckets; b += kThreads) {
      if (counts[b] == 0) continue;
      atomicAdd(&histogram.counts[b], static_cast<unsigned long long>(counts[b]));
      atomicMin(&histogram.smallest[b], smallest[b]);
      atomicMax(&histogram.largest[b], largest[b]);
      counts[b] = 0, smallest[b] = ~0u, largest[b] = 0;
    }
    __syncthreads();
  }
}

// One thread block per search: the answer, or a narrower bracket and an empty histogram.
__global__ void __launch_bounds__(kThreads) narrow(int n_sources, int n_which, Search* searches, Histogram* histograms,
                                                   Reduced* reduced, int* unresolved) {
  Search& search = searches[blockIdx.x];
  const Search old = search;
  if (old.rank == 0) return;
  Histogram& histogram = histograms[blockIdx.x];
  const int64_t above = static_cast<int64_t>(histogram.above);
  const Picked found = old.rank <= above ? Picked{-1, 0} : pick(histogram.counts, old.rank - above);
  uint32_t low = 0, high = 0;
  if (old.rank <= above) low = old.high + 1, high = kHighest;
  else if (found.bucket < 0) low = 0, high = old.low - 1;
  else low = histogram.smallest[found.bucket], high = histogram.largest[found.bucket];
  __syncthreads();  // all threads have read
  for (int b = threadIdx.x; b < kBuckets; b += kThreads)
    histogram.counts[b] = 0, histogram.smallest[b] = ~0u, histogram.largest[b] = 0;
  if (threadIdx.x != 0) return;
  histogram.above = 0;
  const int r = static_cast<int>(blockIdx.x) / (n_sources * n_which);
  const int item = static_cast<int>(blockIdx.x) % (n_sources * n_which);
  if (low == high) resolve(search, low, item % n_which, item / n_which, reduced[r], unresolved);
  else search = narrowed(old.rank, low, high);
}

}  // namespace

void queue_thresholds(const Reduction& on, int64_t n_tiles, int n_which, int n_processors, Search* searches,
                      Histogram* histograms, int* unresolved) {
  const int n_items = on.n_sources * n_which;
  const int64_t n_searches = static_cast<int64_t>(on.n_rows) * n_items;
  const int64_t walks = std::clamp<int64_t>(n_processors * 8 / n_items, 1, n_tiles);
  launch("launching the samples", on.stream, n_searches, sample_keys, on.rows, on.n_sources, n_which, searches,
         histograms, on.reduced, unresolved);
  for (int pass = 0; pass < kPasses; ++pass) {
    launch("launching the histograms", on.stream, walks * n_items, count_keys, on.rows, on.n_rows, n_tiles,
           on.n_sources, n_which, searches, histograms, unresolved);
    launch("launching the selection", on.stream, n_searches, narrow, on.n_sources, n_which, searches, histograms,
           on.reduced, unresolved);
  }
}

}  // namespace gptailor
