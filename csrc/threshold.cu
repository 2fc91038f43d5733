// The exact k-th largest magnitude of source - base, by radix select: threshold.cpp for a list of tensors on a GPU.
#include <algorithm>

#include "cuda_common.cuh"

namespace gptailor {

namespace {

// One pass. blockIdx.y is the source. A thread block walks over consecutive tiles and hands its histogram over when it
// comes to another tensor.
__global__ void __launch_bounds__(kThreads) count_pass(const DeviceTensor* rows, int n_rows, int64_t n_tiles,
                                                       int n_sources, int pass, const RadixState* states,
                                                       unsigned long long* counts) {
  __shared__ unsigned histogram[kRadixBuckets];
  for (int b = threadIdx.x; b < kRadixBuckets; b += kThreads) histogram[b] = 0;
  __syncthreads();

  const int source = blockIdx.y;
  const int shift = radix_shift(pass);
  const unsigned mask = static_cast<unsigned>(radix_buckets(pass)) - 1;
  const int above = pass == 0 ? 31 : radix_shift(pass - 1);
  const int64_t per_block = (n_tiles + gridDim.x - 1) / gridDim.x;
  const int64_t first = blockIdx.x * per_block;
  const int64_t last = min(first + per_block, n_tiles);
  for (int64_t tile = first; tile < last; ++tile) {
    const int r = find_row(rows, n_rows, &DeviceTensor::first_tile, tile);
    const DeviceTensor& row = rows[r];
    const int64_t select = static_cast<int64_t>(r) * n_sources + source;
    const int64_t begin = (tile - row.first_tile) * kTile;
    const int64_t end = min(begin + kTile, row.n_elements);
    if (states[select].remaining > 0) {
      const unsigned prefix = states[select].prefix;
      for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        float x[1], base[1];
        load(row.sources[source], row.source_dtypes[source], i, x);
        load(row.base, row.base_dtype, i, base);
        const unsigned bits = magnitude_bits(x[0] - base[0]);
        if (pass == 0 || (bits >> above) == prefix) atomicAdd(&histogram[(bits >> shift) & mask], 1u);
      }
    }
    if (tile + 1 < last && end < row.n_elements) continue;
    __syncthreads();
    for (int b = threadIdx.x; b < kRadixBuckets; b += kThreads) {
      if (histogram[b] != 0) atomicAdd(&counts[select * kRadixBuckets + b], histogram[b]);
      histogram[b] = 0;
    }
    __syncthreads();
  }
}

// One thread block for each tensor and source: goes down the histogram to the bucket with the wanted rank.
__global__ void __launch_bounds__(kThreads) select_bucket(int n_sources, int pass, RadixState* states,
                                                          unsigned long long* counts, Reduced* reduced) {
  __shared__ unsigned long long histogram[kRadixBuckets];
  unsigned long long* mine = counts + static_cast<int64_t>(blockIdx.x) * kRadixBuckets;
  for (int b = threadIdx.x; b < kRadixBuckets; b += kThreads) {
    histogram[b] = mine[b];
    mine[b] = 0;  // for the next pass
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  RadixState& state = states[blockIdx.x];
  uint32_t& threshold = reduced[blockIdx.x / n_sources].thresholds[blockIdx.x % n_sources];
  if (state.remaining == 0) {
    threshold = 0;  // keeps everything
    return;
  }
  int bucket = radix_buckets(pass) - 1;
  while (bucket > 0 && static_cast<int64_t>(histogram[bucket]) < state.remaining) {
    state.remaining -= static_cast<int64_t>(histogram[bucket]);
    --bucket;
  }
  const int bits = (pass == 0 ? 31 : radix_shift(pass - 1)) - radix_shift(pass);
  state.prefix = (state.prefix << bits) | static_cast<uint32_t>(bucket);
  threshold = state.prefix;
}

}  // namespace

void queue_thresholds(const DeviceTensor* rows, int n_rows, int64_t n_tiles, int n_sources, int n_processors,
                      RadixState* states, unsigned long long* counts, Reduced* reduced, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(n_tiles, n_processors * 8)),
                  static_cast<unsigned>(n_sources));
  for (int pass = 0; pass < kRadixPasses; ++pass) {
    count_pass<<<grid, kThreads, 0, stream>>>(rows, n_rows, n_tiles, n_sources, pass, states, counts);
    check_cuda(cudaGetLastError(), "launching the histograms of ties");
    select_bucket<<<static_cast<unsigned>(n_rows * n_sources), kThreads, 0, stream>>>(n_sources, pass, states, counts,
                                                                                      reduced);
    check_cuda(cudaGetLastError(), "launching the selection of ties");
  }
}

}  // namespace gptailor
