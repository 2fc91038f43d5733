// Shared by the CUDA sources: the table of tensors, tiles, loads and stores, error checks.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "coefficients.h"
#include "formulas.h"

namespace gptailor {

// A row of the pointer table in device memory.
struct DeviceTensor {
  const void* sources[kMaxSources];
  const void* base;
  void* out;
  int64_t n_elements;
  int64_t first_tile;   // number of tiles before this tensor
  int64_t first_block;  // number of reduction blocks before this tensor
  PhiloxKey key;
  int index;            // in the caller's list
  DType source_dtypes[kMaxSources];
  DType base_dtype;
  DType out_dtype;
  bool aligned;  // every pointer is aligned to 16 bytes
};

// Values that depend on the tensor: the method's at first, then those found by a reduction over the inputs.
struct Reduced {
  float weights[kMaxSources];
  uint32_t low[kMaxSources];
  uint32_t high[kMaxSources];
  float scales[kMaxSources];
};

inline constexpr int kThreads = 256;
inline constexpr int kVector = 8;            // elements that a thread handles at a time: 16 bytes of BF16 and F16
inline constexpr int64_t kTile = 4 * kThreads * kVector;

inline void check_cuda(cudaError_t error, const char* operation) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next check does not find it again
  throw std::runtime_error(std::string("CUDA: ") + operation + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

// Makes a device the current one for a while. Does nothing if it already is: setting a device that nobody uses would
// create a context there, which costs memory.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "querying the current device");
    if (previous_ == device) return;
    check_cuda(cudaSetDevice(device), "setting the device");
    changed_ = true;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Queues a kernel with kThreads threads per block. Arguments are converted to the kernel's parameter types.
template <class... P, class... A>
void launch(const char* operation, cudaStream_t stream, int64_t n_blocks, void (*kernel)(P...), const A&... arguments) {
#ifdef GPTAILOR_EMULATED_CUDA
  static_cast<void>(stream);
  emulated::launch(dim3(static_cast<unsigned>(n_blocks)), kThreads, [&] { kernel(static_cast<P>(arguments)...); });
#else
  kernel<<<static_cast<unsigned>(n_blocks), kThreads, 0, stream>>>(static_cast<P>(arguments)...);
#endif
  check_cuda(cudaGetLastError(), operation);
}

// The row whose tiles (or blocks, by the member given) contain `index`. No row is empty.
__device__ inline int find_row(const DeviceTensor* rows, int n_rows, int64_t DeviceTensor::*first, int64_t index) {
  int low = 0, high = n_rows - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (rows[middle].*first <= index) low = middle;
    else high = middle - 1;
  }
  return low;
}

// W consecutive elements from element i as float32. W is kVector, for 16-byte accesses to aligned tensors, or 1.
template <int W>
__device__ __forceinline__ void load(const void* data, DType dtype, int64_t i, float (&x)[W]) {
  static_assert(W == 1 || W == kVector, "");
  if (dtype == DType::F32) {
    if constexpr (W == 1) {
      x[0] = static_cast<const float*>(data)[i];
    } else {
      const float4 a = reinterpret_cast<const float4*>(static_cast<const float*>(data) + i)[0];
      const float4 b = reinterpret_cast<const float4*>(static_cast<const float*>(data) + i)[1];
      x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    }
    return;
  }
  uint16_t h[W];
  if constexpr (W == 1) {
    h[0] = static_cast<const uint16_t*>(data)[i];
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + i);
    memcpy(h, &raw, sizeof raw);
  }
#pragma unroll
  for (int e = 0; e < W; ++e) x[e] = dtype == DType::BF16 ? bf16_to_f32(h[e]) : f16_to_f32(h[e]);
}

template <int W>
__device__ __forceinline__ void store(const float (&x)[W], void* data, DType dtype, int64_t i) {
  static_assert(W == 1 || W == kVector, "");
  if (dtype == DType::F32) {
    if constexpr (W == 1) {
      static_cast<float*>(data)[i] = x[0];
    } else {
      float4* to = reinterpret_cast<float4*>(static_cast<float*>(data) + i);
      to[0] = make_float4(x[0], x[1], x[2], x[3]);
      to[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
    return;
  }
  uint16_t h[W];
#pragma unroll
  for (int e = 0; e < W; ++e) h[e] = dtype == DType::BF16 ? f32_to_bf16(x[e]) : f32_to_f16(x[e]);
  if constexpr (W == 1) {
    static_cast<uint16_t*>(data)[i] = h[0];
  } else {
    uint4 raw;
    memcpy(&raw, h, sizeof raw);
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(data) + i) = raw;
  }
}

// Decides which differences stay, by Params and the tensor's own values, and scales them. `i`: the index of the first
// element, a multiple of W. CPU: apply_keep() and scale() in kernel_blocks.h.
template <Keep K, int W>
__device__ __forceinline__ void keep(const Reduced& reduced, const Params& p, PhiloxKey key, int s, int64_t i,
                                     float (&d)[W]) {
  if constexpr (K == Keep::magnitude) {
    const uint32_t low = reduced.low[s], high = reduced.high[s];
#pragma unroll
    for (int e = 0; e < W; ++e) d[e] = keeps_magnitude(d[e], low, high) ? d[e] : 0.0f;
  }
  if constexpr (K == Keep::random) {
    if (p.chances[s] >= kAlways) return;
    const uint32_t below = static_cast<uint32_t>(p.chances[s]);
    uint32_t words[kPhiloxWords];
#pragma unroll
    for (int e = 0; e < W; ++e) {
      const int64_t at = i + e;
      if (e % kPhiloxWords == 0)
        philox(key, static_cast<uint64_t>(at / kPhiloxWords), static_cast<uint32_t>(s), words);
      const int word = W == 1 ? static_cast<int>(at % kPhiloxWords) : e % kPhiloxWords;
      d[e] *= words[word] < below ? 1.0f : 0.0f;
    }
  }
}

inline constexpr int kWarp = 32;

// CPU: fold() in kernel_sums.h.
__device__ __forceinline__ double fold(double value) {
  static_assert(kLanes == kWarp, "a lane of the reduction is a lane of a warp");
  for (int half = kLanes / 2; half > 0; half /= 2) value += __shfl_down_sync(0xffffffffu, value, half);
  return value;
}

// sums.cu. The input of a reduction over a list of tensors.
struct Reduction {
  const DeviceTensor* rows;
  int n_rows;
  int64_t n_blocks;
  int n_sources;
  Reduced* reduced;
  cudaStream_t stream;
};

// Inner products, then the weights of methods on a sphere. partials: n_pairs(n_sources) doubles for each block.
void queue_sphere(const Reduction& on, const SphereParams& sphere, bool deltas, double* partials);

// Sums of magnitudes before and after the keep stage, then the scales of the sources whose bit is set in `sparse`.
// partials: 2 * n_sources doubles for each block.
void queue_scales(const Reduction& on, Keep keep, const Params& params, unsigned sparse, double* partials);

// threshold.cu. A search for one k-th magnitude of source - base. Correct whatever the bracket is, which only says
// where to look first.
struct Search {
  int64_t rank;  // 1 is the largest; 0: nothing to find
  uint32_t low, high;  // the bracket, inclusive
  int shift;           // (high - low) >> shift < kBuckets
};
inline constexpr int kBuckets = 2048;
struct Histogram {
  unsigned long long above;
  unsigned long long counts[kBuckets];
  uint32_t smallest[kBuckets], largest[kBuckets];
};

// searches: for each row and source one (trimming), or one for `low` and one for `high` (n_which 2); unresolved: how
// many have a rank. Both are modified. histograms: one for each search, need not be cleared.
void queue_thresholds(const Reduction& on, int64_t n_tiles, int n_which, int n_processors, Search* searches,
                      Histogram* histograms, int* unresolved);

}  // namespace gptailor
