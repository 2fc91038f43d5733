// What the CUDA sources share: the table of tensors, tiles, loads and stores, error checks.
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
  DType source_dtypes[kMaxSources];
  DType base_dtype;
  DType out_dtype;
  bool aligned;  // every pointer to 16 bytes
};

// What the reductions found out about a tensor.
struct Reduced {
  float weights[kMaxSources];        // methods on a sphere
  uint32_t thresholds[kMaxSources];  // ties
};

// One radix select under way. remaining: rank of the wanted magnitude among those with the prefix; 0: nothing to find.
struct RadixState {
  int64_t remaining;
  uint32_t prefix;
};

inline constexpr int kThreads = 256;
inline constexpr int kVector = 8;            // elements that a thread handles at a time: 16 bytes of BF16 and F16
inline constexpr int64_t kTile = 4 * kThreads * kVector;

inline void check_cuda(cudaError_t error, const char* operation) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not to be found again by whoever asks next
  throw std::runtime_error(std::string("CUDA: ") + operation + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

// Makes a device the current one for a while. Leaves the current one alone if it is that already: setting a device that
// nobody uses would make a context there, which costs memory.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "asking for the current device");
    if (previous_ == device) return;
    check_cuda(cudaSetDevice(device), "choosing the device");
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

// Queue the reductions of slerp and ties; they fill in `reduced`, a row for each tensor.
// partials: 3 * n_blocks doubles.
void queue_slerp(const DeviceTensor* rows, int n_rows, int64_t n_blocks, const SphereParams& sphere, double* partials,
                 Reduced* reduced, cudaStream_t stream);
// states: n_rows * n_sources, with `remaining` set; counts: kRadixBuckets for each of them, zeroed.
void queue_thresholds(const DeviceTensor* rows, int n_rows, int64_t n_tiles, int n_sources, int n_processors,
                      RadixState* states, unsigned long long* counts, Reduced* reduced, cudaStream_t stream);

}  // namespace gptailor
