// Merges whole lists of tensors on a GPU, in the caller's stream.
#pragma once

#include <vector>

#include "merge_cpu.h"

namespace gptailor {

struct CudaTensor {
  int64_t n_elements = 0;
  void* out = nullptr;
  DType out_dtype = DType::F32;
  Input sources[kMaxSources];
  Input base;
  uint64_t key = 0;  // for random masks
};

// All pointers are device memory of `device`; all tensors of the list use the same method. If the result of tensors[k]
// holds a NaN, found[2 * k] becomes 1; if a finite result is too large for F16, found[2 * k + 1] does (nullptr: not
// checked). Work is queued on `stream` (a cudaStream_t as an integer) and not waited for. Throws std::runtime_error
// with CUDA's message, and std::invalid_argument for a method without a GPU path.
void merge_cuda(const Method& method, int n_sources, const std::vector<CudaTensor>& tensors, int* found, int device,
                uintptr_t stream);

// Throws std::runtime_error with instructions if the build has no CUDA.
void require_cuda();

int cuda_device_count();  // 0 without a GPU, a driver or CUDA in the build

}  // namespace gptailor
