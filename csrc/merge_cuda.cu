// Merges a list of tensors on a GPU: a table of pointers is copied there, then come the reductions that the method
// needs, and one launch of a persistent grid does the elementwise work for the whole list.
#include "merge_cuda.h"

#include <algorithm>
#include <cstring>

#include "cuda_common.cuh"
#include "cuda_workspace.h"
#include "declared_methods.h"

namespace gptailor {

namespace {

// A cast, or nothing at all. CPU: copy() in kernel_merge.h.
struct Copy {
  static constexpr bool kUsesBase = false, kTakesDelta = false;
  static constexpr int kState = 1;
  __device__ static void step(float (&s)[kState], float x, float, const Params&) { s[0] = x; }
  __device__ static float end(const float (&s)[kState], float, const Params&) { return s[0]; }
};

// W elements, starting with i. Returns kFoundNan and kFoundOverflow, as the CPU's kernels do.
template <class F, Keep K, int W>
__device__ __forceinline__ unsigned merge_at(const DeviceTensor& row, const Reduced& reduced, int64_t i, int n_sources,
                                         const Params& p) {
  float base[W] = {};
  if constexpr (F::kUsesBase) load(row.base, row.base_dtype, i, base);
  float state[W][F::kState];
#pragma unroll
  for (int e = 0; e < W; ++e)
#pragma unroll
    for (int k = 0; k < F::kState; ++k) state[e][k] = kEmptySum;
#pragma unroll 4
  for (int s = 0; s < n_sources; ++s) {
    float x[W];
    load(row.sources[s], row.source_dtypes[s], i, x);
    const float weight = reduced.weights[s];
    if constexpr (F::kTakesDelta) {
#pragma unroll
      for (int e = 0; e < W; ++e) x[e] -= base[e];
      if constexpr (K != Keep::all) {
        keep<K>(reduced, p, row.key, s, i, x);
        const float scale = reduced.scales[s];
        if (scale != 1.0f) {
#pragma unroll
          for (int e = 0; e < W; ++e) x[e] *= scale;
        }
      }
    }
#pragma unroll
    for (int e = 0; e < W; ++e) F::step(state[e], x[e], weight, p);
  }
  float out[W];
  bool nan = false, overflow = false;
#pragma unroll
  for (int e = 0; e < W; ++e) {
    out[e] = F::end(state[e], base[e], p);
    nan = nan || is_nan(out[e]);
    overflow = overflow || overflows_f16(out[e]);
  }
  store(out, row.out, row.out_dtype, i);
  return (nan ? kFoundNan : 0u) | (overflow && row.out_dtype == DType::F16 ? kFoundOverflow : 0u);
}

template <class F, Keep K>
__global__ void __launch_bounds__(kThreads) merge_list(const DeviceTensor* __restrict__ rows, int n_rows,
                                                       int64_t n_tiles, int n_sources,
                                                       const Reduced* __restrict__ reduced, int* found_flags,
                                                       const __grid_constant__ Params p) {
  for (int64_t tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
    const int r = find_row(rows, n_rows, &DeviceTensor::first_tile, tile);
    const DeviceTensor& row = rows[r];
    const int64_t begin = (tile - row.first_tile) * kTile;
    const int64_t end = min(begin + kTile, row.n_elements);
    const int64_t vector_end = row.aligned ? end - (end - begin) % kVector : begin;
    unsigned found = 0;
    for (int64_t i = begin + threadIdx.x * kVector; i < vector_end; i += kThreads * kVector)
      found |= merge_at<F, K, kVector>(row, reduced[r], i, n_sources, p);
    for (int64_t i = vector_end + threadIdx.x; i < end; i += kThreads)
      found |= merge_at<F, K, 1>(row, reduced[r], i, n_sources, p);
    if (found != 0 && found_flags != nullptr) {  // all writers write the same value
      if (found & kFoundNan) found_flags[2 * row.index] = 1;
      if (found & kFoundOverflow) found_flags[2 * row.index + 1] = 1;
    }
  }
}

using Kernel = void (*)(const DeviceTensor*, int, int64_t, int, const Reduced*, int*, Params);

Kernel kernel_of(const Method& m, Keep keep) {
  if (m.is_copy) return merge_list<Copy, Keep::all>;
#define GPTAILOR_KERNEL(name, kept) \
  if (m.formula == Formula::name && keep == Keep::kept) return merge_list<FormulaOf<Formula::name>::type, Keep::kept>;
  GPTAILOR_GPU_KERNELS(GPTAILOR_KERNEL)
#undef GPTAILOR_KERNEL
  throw std::invalid_argument(m.name + " has no GPU path: merge it on the CPU");
}

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
  row.key = philox_key(method.seed, tensor.key);
  return row;
}

void check_supported(const Method& m) {
  const bool whole = m.analysis != Analysis::sphere || m.sphere_by == Weights::whole;
  if (!whole) throw std::invalid_argument(m.name + " by rows or columns has no GPU path: merge it on the CPU");
  if (!m.on_gpu) throw std::invalid_argument(m.name + " has no GPU path: merge it on the CPU");
}

// The method's own values for a tensor, and the k-th magnitudes (`searches`: n_which for each source) that have to be
// found. CPU: find_thresholds() in analysis.cpp.
Reduced start(const Method& m, int n_sources, int64_t n_elements, int n_which, std::vector<Search>& searches) {
  Reduced reduced{};
  for (int s = 0; s < n_sources; ++s) {
    reduced.weights[s] = m.params.weights[s];
    reduced.low[s] = m.params.low[s];
    reduced.high[s] = m.params.high[s];
    reduced.scales[s] = m.params.scales[s];
    if (n_which == 0) continue;
    int64_t low = 0, high = 0;
    if (m.densities[s] < 1.0 && m.analysis == Analysis::trim) {
      const int64_t kept = kept_elements(m.densities[s], n_elements);
      if (kept < n_elements) low = kept;
    } else if (m.densities[s] < 1.0) {
      const Ranks ranks = ranks_without_outliers(m.densities[s], m.gammas[s], n_elements);
      if (ranks.first > ranks.last) {
        reduced.low[s] = kNothing, reduced.high[s] = 0;
      } else {
        low = ranks.last < n_elements ? ranks.last : 0;
        high = ranks.first > 1 ? ranks.first : 0;
      }
    }
    searches.push_back({low, 0, 0, 0});
    if (n_which == 2) searches.push_back({high, 0, 0, 0});
  }
  return reduced;
}

}  // namespace

void merge_cuda(const Method& method, int n_sources, const std::vector<CudaTensor>& tensors, int* found, int device,
                uintptr_t stream_handle) {
  check_supported(method);
  unsigned sparse = 0;
  for (int s = 0; s < n_sources; ++s)
    if (method.keep != Keep::all && method.densities[s] < 1.0) sparse |= 1u << s;
  const Keep keep = sparse == 0 ? Keep::all : method.keep;
  const Kernel kernel = kernel_of(method, keep);
  const int n_which = sparse == 0                            ? 0
                      : method.analysis == Analysis::trim     ? 1
                      : method.analysis == Analysis::outliers ? 2
                                                              : 0;
  std::vector<DeviceTensor> rows;
  std::vector<Reduced> starts;
  std::vector<Search> searches;
  int64_t n_tiles = 0, n_blocks = 0;
  for (size_t k = 0; k < tensors.size(); ++k) {
    const CudaTensor& tensor = tensors[k];
    if (tensor.n_elements == 0) continue;
    rows.push_back(row_of(tensor, method, n_sources));
    rows.back().index = static_cast<int>(k);
    rows.back().first_tile = n_tiles;
    rows.back().first_block = n_blocks;
    n_tiles += (tensor.n_elements + kTile - 1) / kTile;
    n_blocks += (tensor.n_elements + kReduceBlock - 1) / kReduceBlock;
    starts.push_back(start(method, n_sources, tensor.n_elements, n_which, searches));
  }
  if (rows.empty()) return;
  const auto wanted = std::count_if(searches.begin(), searches.end(), [](const Search& s) { return s.rank > 0; });
  const bool on_sphere = method.analysis == Analysis::sphere, scales = method.rescale && keep != Keep::all;
  const int n_sums = on_sphere ? n_pairs(n_sources) : scales ? 2 * n_sources : 0;

  Layout layout;
  const size_t rows_at = layout.add<DeviceTensor>(rows.size());
  const size_t reduced_at = layout.add<Reduced>(starts.size());
  const size_t searches_at = layout.add<Search>(searches.size());
  const size_t unresolved_at = layout.add<int>(1);
  const size_t upload_bytes = layout.size;
  const size_t histograms_at = layout.add<Histogram>(wanted > 0 ? searches.size() : 0);
  const size_t partials_at = layout.add<double>(static_cast<size_t>(n_blocks) * static_cast<size_t>(n_sums));

  std::vector<std::byte> upload(upload_bytes);
  memcpy(upload.data() + rows_at, rows.data(), rows.size() * sizeof(DeviceTensor));
  memcpy(upload.data() + reduced_at, starts.data(), starts.size() * sizeof(Reduced));
  if (!searches.empty()) memcpy(upload.data() + searches_at, searches.data(), searches.size() * sizeof(Search));
  const int unresolved = static_cast<int>(wanted);
  memcpy(upload.data() + unresolved_at, &unresolved, sizeof unresolved);

  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  DeviceMemory& memory = DeviceMemory::of(device);
  const Workspace workspace(memory, layout.size, stream);
  memory.upload(workspace.at<void>(0), upload.data(), upload_bytes, stream);

  const Reduction on{workspace.at<DeviceTensor>(rows_at), static_cast<int>(rows.size()), n_blocks, n_sources,
                     workspace.at<Reduced>(reduced_at), stream};
  if (on_sphere) queue_sphere(on, method.sphere, takes_delta(method.formula), workspace.at<double>(partials_at));
  if (wanted > 0)
    queue_thresholds(on, n_tiles, n_which, memory.n_processors(), workspace.at<Search>(searches_at),
                     workspace.at<Histogram>(histograms_at), workspace.at<int>(unresolved_at));
  if (scales) queue_scales(on, keep, method.params, sparse, workspace.at<double>(partials_at));
  launch("launching the merge", stream, std::min<int64_t>(n_tiles, memory.n_processors() * 8), kernel, on.rows,
         on.n_rows, n_tiles, n_sources, on.reduced, found, method.params);
}

void require_cuda() {}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

}  // namespace gptailor
