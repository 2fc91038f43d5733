// Staging for a GPU: page-locked buffers, and an event after the last copy out of each.
#include <cstdint>

#include "cuda_common.cuh"
#include "load.h"

namespace gptailor {

namespace {

class Event {
 public:
  Event() {
    // A waiting reader sleeps, so that it does not take a core from those that read.
    check_cuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming | cudaEventBlockingSync), "creating an event");
  }
  Event(Event&& other) noexcept : event_(other.event_) { other.event_ = nullptr; }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class CudaStaging : public Staging {
 public:
  CudaStaging(int device, int n_slots, int64_t slot_bytes) : device_(device), slot_bytes_(slot_bytes) {
    const DeviceGuard guard(device);
    int supported = 0;
    check_cuda(cudaDeviceGetAttribute(&supported, cudaDevAttrHostRegisterReadOnlySupported, device),
               "querying whether read-only memory can be page-locked");
    pin_flags_ = supported != 0 ? cudaHostRegisterReadOnly : cudaHostRegisterDefault;
    events_.reserve(static_cast<size_t>(n_slots));
    for (int slot = 0; slot < n_slots; ++slot) events_.emplace_back();
    void* memory = nullptr;
    check_cuda(cudaHostAlloc(&memory, static_cast<size_t>(n_slots * slot_bytes), cudaHostAllocDefault),
               "allocating page-locked buffers");
    memory_.reset(static_cast<std::byte*>(memory));
    if (reinterpret_cast<uintptr_t>(memory) % static_cast<uintptr_t>(kPage) != 0)
      throw std::runtime_error("CUDA: page-locked memory is not page-aligned");
  }

  std::byte* buffer(int slot) override { return memory_.get() + slot * slot_bytes_; }

  // An event that was never recorded counts as done.
  void wait(int slot) override {
    const DeviceGuard guard(device_);
    check_cuda(cudaEventSynchronize(events_[static_cast<size_t>(slot)].get()), "waiting for a copy to the GPU");
  }

  void send(const std::byte* from, std::byte* to, int64_t n_bytes, uintptr_t stream) override {
    const DeviceGuard guard(device_);
    check_cuda(cudaMemcpyAsync(to, from, static_cast<size_t>(n_bytes), cudaMemcpyHostToDevice,
                               reinterpret_cast<cudaStream_t>(stream)),
               "copying to the GPU");
  }

  void sent(int slot, uintptr_t stream) override {
    const DeviceGuard guard(device_);
    check_cuda(cudaEventRecord(events_[static_cast<size_t>(slot)].get(), reinterpret_cast<cudaStream_t>(stream)),
               "recording an event");
  }

  void pin(const std::byte* data, int64_t n_bytes) override {
    const DeviceGuard guard(device_);
    check_cuda(cudaHostRegister(const_cast<std::byte*>(data), static_cast<size_t>(n_bytes), pin_flags_),
               "page-locking a mapped file");
  }

  void unpin(const std::byte* data) noexcept override {
    cudaHostUnregister(const_cast<std::byte*>(data));  // belongs to the process, not to the current device
    cudaGetLastError();
  }

  void wait_for_all() noexcept override {
    try {
      const DeviceGuard guard(device_);
      check_cuda(cudaDeviceSynchronize(), "waiting for the GPU");
    } catch (const std::exception&) {  // the GPU is lost, or the driver was shut down at the end of the process
    }
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const { cudaFreeHost(memory); }
  };
  const int device_;
  const int64_t slot_bytes_;
  unsigned pin_flags_ = 0;
  std::vector<Event> events_;
  std::unique_ptr<std::byte, Free> memory_;
};

}  // namespace

std::unique_ptr<Staging> make_cuda_staging(int device, int n_slots, int64_t slot_bytes) {
  return std::make_unique<CudaStaging>(device, n_slots, slot_bytes);
}

}  // namespace gptailor
