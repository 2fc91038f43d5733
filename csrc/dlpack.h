// Exchanges tensors with other libraries through DLPack (https://dmlc.github.io/dlpack), without copies or their
// headers.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor.h"

namespace gptailor {

// DLPack's device types that matter here.
inline constexpr int kDeviceCpu = 1;
#ifdef GPTAILOR_EMULATED_CUDA
inline constexpr int kDeviceCuda = kDeviceCpu;
#else
inline constexpr int kDeviceCuda = 2;
#endif

// A "dltensor" capsule that keeps tensor.owner alive. Raises BufferError for a dtype that DLPack lacks.
pybind11::capsule to_dlpack(const Tensor& tensor);

struct ForeignTensor {
  Tensor tensor;
  int device_type = 0;
  int device_id = 0;
};

// Views a contiguous tensor of any library that supports DLPack; the result keeps it alive. Raises BufferError.
ForeignTensor from_dlpack(const pybind11::object& object);

}  // namespace gptailor
