// Handles SIGBUS inside a mapped file, which means that the file became shorter or its disk can't be read. Instead of
// ending the process, the rest of the mapping is replaced by zeros and marked as broken, for check_intact() to find.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace gptailor {

struct WatchedRange {
  std::atomic<uintptr_t> begin{0}, end{0};  // whole pages; end 0: free
  std::atomic<bool> broken{false};
};

// Watches one mapping for as long as it lives. The first one installs our signal handler in the process; a SIGBUS
// elsewhere is passed on to the previous handler.
class FaultGuard {
 public:
  FaultGuard() = default;
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;
  ~FaultGuard();

  void watch(const std::byte* data, int64_t n_bytes);  // once; n_bytes > 0
  bool broken() const { return range_ != nullptr && range_->broken.load(std::memory_order_acquire); }

 private:
  WatchedRange* range_ = nullptr;
};

}  // namespace gptailor
