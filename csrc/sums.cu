// Sums over whole tensors for a list of them: inner products and magnitudes, in the order given in formulas.h, so that
// they equal the CPU's to the last bit. No atomics: the order must not change.
#include <algorithm>

#include "cuda_common.cuh"

namespace gptailor {

namespace {

constexpr int kWarps = kThreads / kWarp;

int64_t blocks_for(int64_t n_warps) { return std::min<int64_t>((n_warps + kWarps - 1) / kWarps, 1 << 16); }

// One warp per reduction block. N sources, all pairs at once; 0: any number, pair by pair.
template <int N>
__global__ void __launch_bounds__(kThreads) gram_blocks(const DeviceTensor* __restrict__ rows, int n_rows,
                                                        int64_t n_blocks, int n_sources, bool deltas,
                                                        double* __restrict__ partials) {
  const int lane = threadIdx.x % kWarp;
  const int pairs = n_pairs(n_sources);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; b < n_blocks; b += stride) {
    const DeviceTensor& row = rows[find_row(rows, n_rows, &DeviceTensor::first_block, b)];
    const int64_t begin = (b - row.first_block) * kReduceBlock;
    const int64_t end = min(begin + kReduceBlock, row.n_elements);
    const auto element = [&](int s, int64_t i) {
      float x[1], base[1] = {0.0f};
      load(row.sources[s], row.source_dtypes[s], i, x);
      if (!deltas) return x[0];
      load(row.base, row.base_dtype, i, base);
      return x[0] - base[0];
    };
    if constexpr (N > 0) {
      double sums[n_pairs(N)] = {};
      for (int64_t i = begin + lane; i < end; i += kLanes) {
        double x[N];
#pragma unroll
        for (int s = 0; s < N; ++s) x[s] = static_cast<double>(element(s, i));
        int pair = 0;
#pragma unroll
        for (int s = 0; s < N; ++s)
#pragma unroll
          for (int t = s; t < N; ++t) sums[pair++] += x[s] * x[t];
      }
#pragma unroll
      for (int pair = 0; pair < n_pairs(N); ++pair) {
        const double sum = fold(sums[pair]);
        if (lane == 0) partials[b * pairs + pair] = sum;
      }
    } else {
      int pair = 0;
      for (int s = 0; s < n_sources; ++s)
        for (int t = s; t < n_sources; ++t, ++pair) {
          double sum = 0.0;
          for (int64_t i = begin + lane; i < end; i += kLanes)
            sum += static_cast<double>(element(s, i)) * static_cast<double>(element(t, i));
          sum = fold(sum);
          if (lane == 0) partials[b * pairs + pair] = sum;
        }
    }
  }
}

// One warp per reduction block and source: the sums of |d| and of the kept |d|.
template <Keep K>
__global__ void __launch_bounds__(kThreads) magnitude_blocks(const DeviceTensor* __restrict__ rows, int n_rows,
                                                             int64_t n_blocks, int n_sources, unsigned sparse,
                                                             const Reduced* __restrict__ reduced,
                                                             const __grid_constant__ Params p,
                                                             double* __restrict__ partials) {
  constexpr int kGroup = kPhiloxWords * kWarp;  // elements that a warp draws random words for at once
  static_assert(kReduceBlock % kGroup == 0, "a reduction block begins with a group");
  __shared__ uint32_t words[kWarps][kGroup];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps, n_warps = n_blocks * n_sources;
  for (int64_t w = static_cast<int64_t>(blockIdx.x) * kWarps + warp; w < n_warps; w += stride) {
    const int64_t b = w / n_sources;
    const int s = static_cast<int>(w % n_sources);
    double all = 0.0, kept = 0.0;
    if ((sparse >> s & 1u) != 0) {
      const int r = find_row(rows, n_rows, &DeviceTensor::first_block, b);
      const DeviceTensor& row = rows[r];
      const int64_t begin = (b - row.first_block) * kReduceBlock;
      const int64_t end = min(begin + kReduceBlock, row.n_elements);
      for (int64_t group = begin; group < end; group += kGroup) {
        if constexpr (K == Keep::random) {
          uint32_t drawn[kPhiloxWords];
          philox(row.key, static_cast<uint64_t>(group / kPhiloxWords + lane), static_cast<uint32_t>(s), drawn);
          __syncwarp();  // all have read those of the previous group
#pragma unroll
          for (int k = 0; k < kPhiloxWords; ++k) words[warp][kPhiloxWords * lane + k] = drawn[k];
          __syncwarp();
        }
#pragma unroll
        for (int k = 0; k < kPhiloxWords; ++k) {
          const int64_t i = group + k * kWarp + lane;
          if (i >= end) continue;
          float x[1], base[1];
          load(row.sources[s], row.source_dtypes[s], i, x);
          load(row.base, row.base_dtype, i, base);
          float d[1] = {x[0] - base[0]};
          all += static_cast<double>(float_from_bits(magnitude_bits(d[0])));
          if constexpr (K == Keep::random) {
            const bool stays = words[warp][k * kWarp + lane] < static_cast<uint32_t>(p.chances[s]);
            d[0] *= stays || p.chances[s] >= kAlways ? 1.0f : 0.0f;
          } else {
            keep<K>(reduced[r], p, row.key, s, i, d);
          }
          kept += static_cast<double>(float_from_bits(magnitude_bits(d[0])));
        }
      }
    }
    all = fold(all), kept = fold(kept);
    if (lane == 0) partials[w * 2] = all, partials[w * 2 + 1] = kept;
  }
}

// Adds up the values of one tensor's blocks, `n_values` for each, in the order of the blocks, into `sums`, which all
// threads see afterwards. All threads fetch; one thread per value adds.
__device__ void add_blocks(const DeviceTensor& row, const double* __restrict__ partials, int n_values,
                           double (&sums)[kMaxPairs]) {
  constexpr int kRoom = 2048;
  __shared__ double fetched[kRoom];
  const int64_t total = (row.n_elements + kReduceBlock - 1) / kReduceBlock * n_values;
  const double* values = partials + row.first_block * n_values;
  const int at_once = kRoom / n_values * n_values;
  double sum = 0.0;
  for (int64_t start = 0; start < total; start += at_once) {
    const int n = static_cast<int>(min(total - start, static_cast<int64_t>(at_once)));
    for (int i = threadIdx.x; i < n; i += kThreads) fetched[i] = values[start + i];
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < n_values)
      for (int i = threadIdx.x; i < n; i += n_values) sum += fetched[i];
    __syncthreads();
  }
  if (static_cast<int>(threadIdx.x) < n_values) sums[threadIdx.x] = sum;
  __syncthreads();
}
static_assert(kMaxPairs <= kThreads && 2 * kMaxSources <= kMaxPairs, "a thread for each sum");

// One thread block per tensor.
__global__ void __launch_bounds__(kThreads) find_weights(const DeviceTensor* __restrict__ rows,
                                                         const double* __restrict__ partials, int n_sources,
                                                         const __grid_constant__ SphereParams sphere,
                                                         Reduced* reduced) {
  __shared__ double gram[kMaxPairs];
  add_blocks(rows[blockIdx.x], partials, n_pairs(n_sources), gram);
  if (threadIdx.x != 0) return;
  float weights[kMaxSources];
  const bool has_answer = sphere_coefficients(sphere, gram, n_sources, weights);
  // Without an answer the result is NaN, which the caller checks for.
  for (int s = 0; s < n_sources; ++s)
    reduced[blockIdx.x].weights[s] = has_answer ? weights[s] : float_from_bits(kInfBits | 0x400000u);
}

__global__ void __launch_bounds__(kThreads) find_scales(const DeviceTensor* __restrict__ rows,
                                                        const double* __restrict__ partials, int n_sources,
                                                        unsigned sparse, Reduced* reduced) {
  __shared__ double sums[kMaxPairs];
  add_blocks(rows[blockIdx.x], partials, 2 * n_sources, sums);
  const int s = threadIdx.x;
  if (s >= n_sources || (sparse >> s & 1u) == 0) return;
  const double all = sums[2 * s], kept = sums[2 * s + 1];
  if (!(all < 1e-7 || kept < 1e-7)) reduced[blockIdx.x].scales[s] = static_cast<float>(all / kept);
}

}  // namespace

void queue_sphere(const Reduction& on, const SphereParams& sphere, bool deltas, double* partials) {
  const auto kernel = on.n_sources == 1   ? gram_blocks<1>
                      : on.n_sources == 2 ? gram_blocks<2>
                      : on.n_sources == 3 ? gram_blocks<3>
                      : on.n_sources == 4 ? gram_blocks<4>
                                          : gram_blocks<0>;
  launch("launching the inner products", on.stream, blocks_for(on.n_blocks), kernel, on.rows, on.n_rows, on.n_blocks,
         on.n_sources, deltas, partials);
  launch("launching the coefficients", on.stream, on.n_rows, find_weights, on.rows, partials, on.n_sources, sphere,
         on.reduced);
}

void queue_scales(const Reduction& on, Keep keep, const Params& params, unsigned sparse, double* partials) {
  const auto kernel = keep == Keep::random ? magnitude_blocks<Keep::random> : magnitude_blocks<Keep::magnitude>;
  launch("launching the sums of magnitudes", on.stream, blocks_for(on.n_blocks * on.n_sources), kernel, on.rows,
         on.n_rows, on.n_blocks, on.n_sources, sparse, on.reduced, params, partials);
  launch("launching the scales", on.stream, on.n_rows, find_scales, on.rows, partials, on.n_sources, sparse,
         on.reduced);
}

}  // namespace gptailor
