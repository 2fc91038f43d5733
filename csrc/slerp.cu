// The norms and the dot product of slerp, in the order that formulas.h lays down, so that the sums are the CPU's.
#include <algorithm>

#include "cuda_common.cuh"

namespace gptailor {

namespace {

constexpr unsigned kWarp = 32;
static_assert(kLanes == kWarp, "a lane of the reduction is a lane of a warp");

// CPU: fold() in kernels.cpp.
__device__ double fold(double value) {
  for (int half = kLanes / 2; half > 0; half /= 2) value += __shfl_down_sync(0xffffffffu, value, half);
  return value;
}

// One warp for each reduction block.
__global__ void __launch_bounds__(kThreads) dot_blocks(const DeviceTensor* rows, int n_rows, int64_t n_blocks,
                                                       double* partials) {
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; b < n_blocks;
       b += stride) {
    const DeviceTensor& row = rows[find_row(rows, n_rows, &DeviceTensor::first_block, b)];
    const int64_t begin = (b - row.first_block) * kReduceBlock;
    const int64_t end = min(begin + kReduceBlock, row.n_elements);
    double xx = 0.0, yy = 0.0, xy = 0.0;
    for (int64_t i = begin + lane; i < end; i += kLanes) {
      float x[1], y[1];
      load(row.sources[0], row.source_dtypes[0], i, x);
      load(row.sources[1], row.source_dtypes[1], i, y);
      const double a = x[0], c = y[0];
      xx += a * a;
      yy += c * c;
      xy += a * c;
    }
    xx = fold(xx), yy = fold(yy), xy = fold(xy);
    if (lane == 0) partials[3 * b] = xx, partials[3 * b + 1] = xy, partials[3 * b + 2] = yy;
  }
}

// One thread block for each tensor. All threads fetch, three add up: the order must not change.
__global__ void __launch_bounds__(kThreads) add_blocks(const DeviceTensor* rows, const double* partials,
                                                       SphereParams sphere, Reduced* reduced) {
  __shared__ double fetched[3 * kThreads];
  __shared__ double sums[3];
  const DeviceTensor& row = rows[blockIdx.x];
  const int64_t n_values = 3 * ((row.n_elements + kReduceBlock - 1) / kReduceBlock);
  const double* values = partials + 3 * row.first_block;
  double sum = 0.0;
  for (int64_t start = 0; start < n_values; start += 3 * kThreads) {
    const int n = static_cast<int>(min(n_values - start, static_cast<int64_t>(3 * kThreads)));
    for (int i = threadIdx.x; i < n; i += kThreads) fetched[i] = values[start + i];
    __syncthreads();
    if (threadIdx.x < 3)
      for (int i = threadIdx.x; i < n; i += 3) sum += fetched[i];
    __syncthreads();
  }
  if (threadIdx.x < 3) sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) sphere_coefficients(sphere, sums, 2, reduced[blockIdx.x].weights);
}

}  // namespace

void queue_slerp(const DeviceTensor* rows, int n_rows, int64_t n_blocks, const SphereParams& sphere, double* partials,
                 Reduced* reduced, cudaStream_t stream) {
  const int64_t blocks = std::min<int64_t>((n_blocks + kThreads / kWarp - 1) / (kThreads / kWarp), 1 << 16);
  dot_blocks<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(rows, n_rows, n_blocks, partials);
  check_cuda(cudaGetLastError(), "launching the dot products of slerp");
  add_blocks<<<static_cast<unsigned>(n_rows), kThreads, 0, stream>>>(rows, partials, sphere, reduced);
  check_cuda(cudaGetLastError(), "launching the sums of slerp");
}

}  // namespace gptailor
