// Memory that every merge on a GPU needs, kept from call to call: stream-ordered device memory, and page-locked memory
// for copies to it. One for each GPU, for as long as the process lives.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_common.cuh"

namespace gptailor {

class DeviceMemory {
 public:
  // The GPU must be the current device.
  static DeviceMemory& of(int device) {
    static std::mutex mutex;
    static std::vector<std::unique_ptr<DeviceMemory>> all;  // never freed: the driver is shut down first
    const std::lock_guard<std::mutex> lock(mutex);
    const auto index = static_cast<size_t>(device);
    if (all.size() <= index) all.resize(index + 1);
    if (!all[index]) all[index].reset(new DeviceMemory(device));
    return *all[index];
  }

  int n_processors() const { return n_processors_; }
  cudaMemPool_t pool() const { return pool_; }

  // Queues a copy of n_bytes to the device. `from` may be reused at once. (For memory that is not page-locked, CUDA may
  // wait for the stream first.)
  void upload(void* to, const std::byte* from, size_t n_bytes, cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Slot& slot = slots_[next_++ % kSlots];
    check_cuda(cudaEventSynchronize(slot.event), "waiting for an earlier table of tensors");
    if (slot.size < n_bytes) {
      if (slot.data != nullptr) check_cuda(cudaFreeHost(slot.data), "freeing page-locked memory");
      slot.data = nullptr, slot.size = 0;
      const size_t size = (n_bytes + kGrain - 1) / kGrain * kGrain;
      check_cuda(cudaHostAlloc(&slot.data, size, cudaHostAllocDefault), "allocating page-locked memory");
      slot.size = size;
    }
    memcpy(slot.data, from, n_bytes);
    check_cuda(cudaMemcpyAsync(to, slot.data, n_bytes, cudaMemcpyHostToDevice, stream), "copying the table of tensors");
    check_cuda(cudaEventRecord(slot.event, stream), "recording an event");
  }

 private:
  static constexpr size_t kSlots = 16, kGrain = size_t{1} << 16;
  static constexpr uint64_t kKeptBytes = uint64_t{256} << 20;
  struct Slot {
    std::byte* data = nullptr;
    size_t size = 0;
    cudaEvent_t event = nullptr;
  };

  explicit DeviceMemory(int device) {
    check_cuda(cudaDeviceGetAttribute(&n_processors_, cudaDevAttrMultiProcessorCount, device),
               "querying the GPU's size");
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    check_cuda(cudaMemPoolCreate(&pool_, &properties), "creating a memory pool");
    uint64_t kept = kKeptBytes;  // not returned at every synchronisation
    check_cuda(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &kept), "setting up a memory pool");
    for (Slot& slot : slots_)
      check_cuda(cudaEventCreateWithFlags(&slot.event, cudaEventDisableTiming), "creating an event");
  }

  int n_processors_ = 0;
  cudaMemPool_t pool_ = nullptr;
  std::mutex mutex_;
  Slot slots_[kSlots];
  size_t next_ = 0;
};

// Device memory that is freed once the work queued during its lifetime is done.
class Workspace {
 public:
  Workspace(const DeviceMemory& memory, size_t n_bytes, cudaStream_t stream) : stream_(stream) {
    check_cuda(cudaMallocFromPoolAsync(&data_, n_bytes, memory.pool(), stream), "allocating the workspace");
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { cudaFreeAsync(data_, stream_); }
  template <class T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(data_) + offset);
  }

 private:
  void* data_ = nullptr;
  cudaStream_t stream_;
};

// Offsets of the arrays in a workspace.
struct Layout {
  size_t size = 0;
  template <class T>
  size_t add(size_t n) {
    const size_t offset = size;
    size += (n * sizeof(T) + 255) / 256 * 256;
    return offset;
  }
};

}  // namespace gptailor
