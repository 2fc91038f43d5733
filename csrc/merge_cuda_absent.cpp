// merge_cuda.h and load.h in a build without CUDA.
#include <stdexcept>

#include "load.h"
#include "merge_cuda.h"

namespace gptailor {

void require_cuda() {
  throw std::runtime_error(
      "this gptailor was built without CUDA: install the CUDA toolkit (nvcc on PATH, or CUDA_HOME set) and reinstall "
      "with GPTAILOR_CUDA=1");
}

void merge_cuda(const Method&, int, const std::vector<CudaTensor>&, int*, int, uintptr_t) { require_cuda(); }

std::unique_ptr<Staging> make_cuda_staging(int, int, int64_t) {
  require_cuda();
  return nullptr;
}

int cuda_device_count() { return 0; }

}  // namespace gptailor
