// Merging a list of tensors on a GPU: a table of pointers goes over, the reductions of slerp and ties follow, and one
// launch of a persistent grid does the elementwise work for the whole list.
#include "merge_cuda.h"

#include <algorithm>
#include <cstring>

#include "cuda_common.cuh"

namespace gptailor {

namespace {

// A cast, or nothing at all. CPU: copy() in kernels.cpp.
struct Copy {
  static constexpr bool kUsesBase = false;
  static constexpr int kState = 1;
  static constexpr bool kTakesDelta = false;
  __device__ static void step(float (&s)[kState], float x, float, const Params&) { s[0] = x; }
  __device__ static float end(const float (&s)[kState], float, const Params&) { return s[0]; }
};

template <class F, int W>
__device__ __forceinline__ void merge_at(const DeviceTensor& row, int64_t i, int n_sources, const float* weights,
                                         const uint32_t* thresholds, const Params& p) {
  float base[W] = {};
  if constexpr (F::kUsesBase) load(row.base, row.base_dtype, i, base);
  float state[W][F::kState];
#pragma unroll
  for (int e = 0; e < W; ++e)
#pragma unroll
    for (int k = 0; k < F::kState; ++k) state[e][k] = kEmptySum;
  for (int s = 0; s < n_sources; ++s) {
    float x[W];
    load(row.sources[s], row.source_dtypes[s], i, x);
    const float weight = weights[s];
    const uint32_t threshold = thresholds[s];
#pragma unroll
    for (int e = 0; e < W; ++e) {
      const float d = F::kTakesDelta ? x[e] - base[e] : x[e];
      F::step(state[e], F::kTakesDelta && !keeps_magnitude(d, threshold, ~0u) ? 0.0f : d, weight, p);
    }
  }
  float out[W];
#pragma unroll
  for (int e = 0; e < W; ++e) out[e] = F::end(state[e], base[e], p);
  store(out, row.out, row.out_dtype, i);
}

template <class F>
__global__ void __launch_bounds__(kThreads) merge_list(const DeviceTensor* rows, int n_rows, int64_t n_tiles,
                                                       int n_sources, const Reduced* reduced, bool weights_reduced,
                                                       const __grid_constant__ Params p) {
  for (int64_t tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
    const int r = find_row(rows, n_rows, &DeviceTensor::first_tile, tile);
    const DeviceTensor& row = rows[r];
    const float* weights = weights_reduced ? reduced[r].weights : p.weights;
    const uint32_t* thresholds = reduced[r].thresholds;
    const int64_t begin = (tile - row.first_tile) * kTile;
    const int64_t end = min(begin + kTile, row.n_elements);
    const int64_t vector_end = row.aligned ? end - (end - begin) % kVector : begin;
    for (int64_t i = begin + threadIdx.x * kVector; i < vector_end; i += kThreads * kVector)
      merge_at<F, kVector>(row, i, n_sources, weights, thresholds, p);
    for (int64_t i = vector_end + threadIdx.x; i < end; i += kThreads)
      merge_at<F, 1>(row, i, n_sources, weights, thresholds, p);
  }
}

// Device memory in stream order: freed when the work queued before has been done.
class Workspace {
 public:
  Workspace(size_t n_bytes, cudaStream_t stream) : stream_(stream) {
    check_cuda(cudaMallocAsync(&data_, n_bytes, stream), "allocating the workspace");
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { cudaFreeAsync(data_, stream_); }
  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  void* data_ = nullptr;
  cudaStream_t stream_;
};

// Offsets of the arrays in the workspace.
struct Layout {
  size_t size = 0;
  size_t add(size_t n_bytes) {
    const size_t offset = size;
    size += (n_bytes + 255) / 256 * 256;
    return offset;
  }
};

DeviceTensor row_of(const CudaTensor& tensor, const Method& method, int n_sources) {
  DeviceTensor row{};
  row.n_elements = tensor.n_elements;
  row.aligned = true;
  const auto take = [&](const void* data, DType dtype) {
    const auto address = reinterpret_cast<uintptr_t>(data);
    if (address % static_cast<uintptr_t>(mergeable_bytes(dtype)) != 0)
      throw std::invalid_argument("a CUDA tensor is not aligned to its element type");
    row.aligned = row.aligned && address % 16 == 0;
  };
  for (int s = 0; s < n_sources; ++s) {
    row.sources[s] = tensor.sources[s].data;
    row.source_dtypes[s] = tensor.sources[s].dtype;
    take(row.sources[s], row.source_dtypes[s]);
  }
  if (uses_base(method.formula)) {
    row.base = tensor.base.data;
    row.base_dtype = tensor.base.dtype;
    take(row.base, row.base_dtype);
  }
  row.out = tensor.out;
  row.out_dtype = tensor.out_dtype;
  take(row.out, row.out_dtype);
  return row;
}

// What the GPU has a path for; the rest is merged on the CPU.
void check_supported(const Method& m) {
  const bool slerp = m.analysis == Analysis::sphere && m.sphere.kind == Sphere::slerp;
  const bool plain = m.analysis == Analysis::none && (m.name == "linear" || m.name == "task_arithmetic");
  if (!(slerp || plain || (m.analysis == Analysis::trim && !m.rescale)))
    throw std::invalid_argument(m.name + " has no GPU path yet: merge it on the CPU");
}

bool trims(const Method& m, int n_sources) {
  return m.analysis == Analysis::trim && std::any_of(m.densities, m.densities + n_sources, [](double d) { return d < 1.0; });
}

}  // namespace

void merge_cuda(const Method& method, int n_sources, const std::vector<CudaTensor>& tensors, int device,
                uintptr_t stream_handle) {
  check_supported(method);
  const bool on_sphere = method.analysis == Analysis::sphere;
  std::vector<DeviceTensor> rows;
  std::vector<RadixState> states;
  int64_t n_tiles = 0, n_blocks = 0;
  for (const CudaTensor& tensor : tensors) {
    if (tensor.n_elements == 0) continue;
    rows.push_back(row_of(tensor, method, n_sources));
    rows.back().first_tile = n_tiles;
    rows.back().first_block = n_blocks;
    n_tiles += (tensor.n_elements + kTile - 1) / kTile;
    n_blocks += (tensor.n_elements + kReduceBlock - 1) / kReduceBlock;
    for (int s = 0; trims(method, n_sources) && s < n_sources; ++s) {
      const int64_t kept = kept_elements(method.densities[s], tensor.n_elements);
      states.push_back({kept < tensor.n_elements ? kept : 0, 0});
    }
  }
  if (rows.empty()) return;
  const int n_rows = static_cast<int>(rows.size());

  const DeviceGuard guard(device);
  int n_processors = 0;
  check_cuda(cudaDeviceGetAttribute(&n_processors, cudaDevAttrMultiProcessorCount, device), "asking for the GPU's size");
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);

  Layout layout;
  const size_t rows_at = layout.add(rows.size() * sizeof(DeviceTensor));
  const size_t reduced_at = layout.add(rows.size() * sizeof(Reduced));
  const size_t states_at = layout.add(states.size() * sizeof(RadixState));
  const size_t upload_bytes = layout.size;
  const size_t counts_bytes = states.size() * kRadixBuckets * sizeof(unsigned long long);
  const size_t counts_at = layout.add(counts_bytes);
  const size_t partials_at =
      layout.add(on_sphere ? static_cast<size_t>(n_blocks) * 3 * sizeof(double) : 0);

  const Workspace workspace(layout.size, stream);
  const auto* device_rows = reinterpret_cast<const DeviceTensor*>(workspace.data() + rows_at);
  auto* reduced = reinterpret_cast<Reduced*>(workspace.data() + reduced_at);

  std::vector<std::byte> upload(upload_bytes);  // Reduced starts as zeros: thresholds that keep everything
  std::memcpy(upload.data() + rows_at, rows.data(), rows.size() * sizeof(DeviceTensor));
  if (!states.empty()) std::memcpy(upload.data() + states_at, states.data(), states.size() * sizeof(RadixState));
  // From pageable memory: CUDA has taken its copy when this returns.
  check_cuda(cudaMemcpyAsync(workspace.data(), upload.data(), upload_bytes, cudaMemcpyHostToDevice, stream),
             "sending the table of tensors");

  if (on_sphere)
    queue_slerp(device_rows, n_rows, n_blocks, method.sphere, reinterpret_cast<double*>(workspace.data() + partials_at),
                reduced, stream);
  if (!states.empty()) {
    auto* counts = reinterpret_cast<unsigned long long*>(workspace.data() + counts_at);
    check_cuda(cudaMemsetAsync(counts, 0, counts_bytes, stream), "clearing the histograms of ties");
    queue_thresholds(device_rows, n_rows, n_tiles, n_sources, n_processors,
                     reinterpret_cast<RadixState*>(workspace.data() + states_at), counts, reduced, stream);
  }

  const auto kernel = method.is_copy                                ? merge_list<Copy>
                      : method.formula == Formula::task_arithmetic ? merge_list<TaskArithmetic>
                      : method.formula == Formula::ties            ? merge_list<Ties>
                                                                   : merge_list<Linear>;
  const auto grid = static_cast<unsigned>(std::min<int64_t>(n_tiles, n_processors * 8));
  kernel<<<grid, kThreads, 0, stream>>>(device_rows, n_rows, n_tiles, n_sources, reduced, on_sphere, method.params);
  check_cuda(cudaGetLastError(), "launching the merge");
}

void require_cuda() {}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

}  // namespace gptailor
