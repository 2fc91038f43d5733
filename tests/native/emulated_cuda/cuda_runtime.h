// CUDA on the CPU, for tests without a GPU: the .cu files are compiled as C++. Each thread of a block is a fiber;
// fibers take turns at barriers and shuffles, so a barrier that not all of them reach is detected (and aborts). Memory
// is the host's, and streams do their work at once. It can't show races between blocks, or timing.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __grid_constant__
#define __shared__ static  // one block runs at a time

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct float4 {
  float x, y, z, w;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

namespace emulated {

constexpr size_t kStack = size_t{1} << 17;
constexpr int kWarp = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

struct Barrier {
  int waiting = 0;
  uint64_t generation = 0;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current = 0;
inline Barrier block_barrier, warp_barriers[64];
inline uint64_t exchanged[64][kWarp];
inline uint64_t progress = 0;  // counts events, to detect a block in which nothing happens

inline void yield() { swapcontext(&fibers[static_cast<size_t>(current)].context, &scheduler); }

inline int alive(int begin, int end) {
  int n = 0;
  for (int i = begin; i < end; ++i) n += !fibers[static_cast<size_t>(i)].done;
  return n;
}

inline void wait(Barrier& barrier, int begin, int end) {
  const uint64_t mine = barrier.generation;
  ++barrier.waiting, ++progress;
  while (barrier.generation == mine) {
    if (barrier.waiting >= alive(begin, end)) {
      barrier.waiting = 0, ++barrier.generation, ++progress;
      return;
    }
    yield();
  }
}

inline void wait_for_warp() {
  const int warp = current / kWarp, n = static_cast<int>(fibers.size());
  // A lane that has ended would make a full mask undefined behaviour on a GPU.
  const int begin = warp * kWarp, end = std::min(n, begin + kWarp);
  if (alive(begin, end) != end - begin) {
    std::fprintf(stderr, "emulated CUDA: a lane of the mask has ended\n");
    std::abort();
  }
  wait(warp_barriers[warp], begin, end);
}

template <class T>
T exchange(T value, int lane, bool valid) {
  const int warp = current / kWarp;
  memcpy(&exchanged[warp][current % kWarp], &value, sizeof value);
  wait_for_warp();
  T result = value;
  if (valid) memcpy(&result, &exchanged[warp][lane], sizeof result);
  wait_for_warp();
  return result;
}

inline void (*body)(void*) = nullptr;
inline void* body_argument = nullptr;

inline void enter() {
  body(body_argument);
  fibers[static_cast<size_t>(current)].done = true;
  ++progress;
  yield();
}

inline void run_block(int n_threads) {
  if (static_cast<int>(fibers.size()) != n_threads) {
    fibers = std::vector<Fiber>(static_cast<size_t>(n_threads));
    for (Fiber& fiber : fibers) fiber.stack.reset(new char[kStack]);
  }
  block_barrier = {};
  for (Barrier& barrier : warp_barriers) barrier = {};
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (int left = n_threads; left > 0;) {
    const uint64_t before = progress;
    for (current = 0; current < n_threads; ++current) {
      Fiber& fiber = fibers[static_cast<size_t>(current)];
      if (fiber.done) continue;
      threadIdx = dim3(static_cast<unsigned>(current));
      swapcontext(&scheduler, &fiber.context);
      left -= fiber.done;
    }
    if (progress == before) {
      std::fprintf(stderr, "emulated CUDA: threads wait at different barriers\n");
      std::abort();
    }
  }
}

// What kernel<<<grid, n_threads>>>(arguments...) does.
template <class F>
void launch(dim3 grid, int n_threads, F&& kernel) {
  gridDim = grid, blockDim = dim3(static_cast<unsigned>(n_threads));
  body = [](void* argument) { (*static_cast<std::remove_reference_t<F>*>(argument))(); };
  body_argument = &kernel;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(n_threads);
      }
  body_argument = nullptr;
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::block_barrier, 0, static_cast<int>(emulated::fibers.size())); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulated::wait_for_warp(); }
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int lane = emulated::current % emulated::kWarp + delta;
  return emulated::exchange(value, lane, lane < emulated::kWarp);
}
template <class T, class U>
T atomicAdd(T* to, U value) {
  const T old = *to;
  *to = static_cast<T>(old + static_cast<T>(value));
  return old;
}
template <class T>
T atomicMin(T* to, T value) {
  const T old = *to;
  *to = std::min(old, value);
  return old;
}
template <class T>
T atomicMax(T* to, T value) {
  const T old = *to;
  *to = std::max(old, value);
  return old;
}

// The runtime.
using cudaStream_t = void*;
using cudaEvent_t = int*;
using cudaMemPool_t = int*;
enum cudaError_t { cudaSuccess = 0, cudaErrorEmulated = 1 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrHostRegisterReadOnlySupported };
enum cudaMemAllocationType { cudaMemAllocationTypePinned };
enum cudaMemLocationType { cudaMemLocationTypeDevice };
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold };
struct cudaMemLocation {
  cudaMemLocationType type;
  int id;
};
struct cudaMemPoolProps {
  cudaMemAllocationType allocType;
  cudaMemLocation location;
};
constexpr unsigned cudaEventDisableTiming = 0, cudaEventBlockingSync = 0, cudaHostAllocDefault = 0;
constexpr unsigned cudaHostRegisterReadOnly = 0, cudaHostRegisterDefault = 0;

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorEmulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMultiProcessorCount ? 2 : 1;
  return cudaSuccess;
}
template <class T>
cudaError_t cudaHostAlloc(T** memory, size_t n_bytes, unsigned) {
  *memory = static_cast<T*>(std::aligned_alloc(4096, (n_bytes + 4095) / 4096 * 4096));
  return *memory == nullptr ? cudaErrorEmulated : cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* memory) { return std::free(memory), cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) {
  return memcpy(to, from, n), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t) { return memset(to, value, n), cudaSuccess; }
inline cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
inline cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = new int, cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) { return *pool = nullptr, cudaSuccess; }
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
// Fresh memory is full of NaN, so a read before the first write shows.
inline cudaError_t cudaMallocFromPoolAsync(void** memory, size_t n_bytes, cudaMemPool_t, cudaStream_t) {
  *memory = std::aligned_alloc(4096, (n_bytes + 4095) / 4096 * 4096);
  if (*memory == nullptr) return cudaErrorEmulated;
  return memset(*memory, 0xff, n_bytes), cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return std::free(memory), cudaSuccess; }
