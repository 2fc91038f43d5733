#include "fault_guard.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>

namespace gptailor {

namespace {

// The handler reads these blocks without a lock; they are never freed. Only writers take the mutex.
struct Block {
  static constexpr int kRanges = 64;
  WatchedRange ranges[kRanges];
  std::atomic<Block*> next{nullptr};
};

Block first_block;
std::mutex mutex;

// The previous handlers from each time that ours was installed. A handler that somebody else installs over ours may
// call ours again, so each is used once, the newest first, and only the oldest stays.
constexpr int kMaxPrevious = 8;
struct sigaction previous[kMaxPrevious];
std::atomic<int> n_previous{0};
uintptr_t page_size = 0;

WatchedRange* range_around(uintptr_t address) {
  for (Block* block = &first_block; block != nullptr; block = block->next.load(std::memory_order_acquire))
    for (WatchedRange& range : block->ranges) {
      const uintptr_t end = range.end.load(std::memory_order_acquire);
      const uintptr_t begin = range.begin.load(std::memory_order_acquire);
      // Another thread may be reusing this entry for another mapping: then the end differs now.
      if (address < end && begin <= address && range.end.load(std::memory_order_acquire) == end) return &range;
    }
  return nullptr;
}

// Replaces our handler by the next one. A fault recurs at once with all its details, because its instruction is run
// again; a signal that was only sent is sent again.
void pass_on(const siginfo_t* info) {
  const int n = n_previous.load();
  if (n > 0) sigaction(SIGBUS, &previous[n - 1], nullptr);
  else signal(SIGBUS, SIG_DFL);
  if (n > 1) n_previous.store(n - 1);
  if (info->si_code <= 0) raise(SIGBUS);  // delivered when ours returns
}

void on_sigbus(int, siginfo_t* info, void*) {
  const int saved = errno;
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  WatchedRange* range = info->si_code == BUS_ADRERR ? range_around(address) : nullptr;
  if (range != nullptr) {
    range->broken.store(true, std::memory_order_release);  // before zeros can be read
    const uintptr_t page = address & ~(page_size - 1);
    void* zeros = mmap(reinterpret_cast<void*>(page), range->end.load() - page, PROT_READ,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    if (zeros == MAP_FAILED) range = nullptr;
  }
  if (range == nullptr) pass_on(info);
  errno = saved;
}

void install() {
  struct sigaction current;
  if (sigaction(SIGBUS, nullptr, &current) != 0) return;
  if ((current.sa_flags & SA_SIGINFO) != 0 && current.sa_sigaction == on_sigbus) return;
  const int n = n_previous.load();
  if (n == kMaxPrevious) return;
  page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  previous[n] = current;
  n_previous.store(n + 1);
  struct sigaction ours = {};
  ours.sa_sigaction = on_sigbus;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, nullptr);
}

}  // namespace

void FaultGuard::watch(const std::byte* data, int64_t n_bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  install();
  Block* block = &first_block;
  while (range_ == nullptr) {
    for (WatchedRange& range : block->ranges)
      if (range_ == nullptr && range.end.load() == 0) range_ = &range;
    if (range_ != nullptr) break;
    if (block->next.load() == nullptr) block->next.store(new Block, std::memory_order_release);
    block = block->next.load();
  }
  const auto begin = reinterpret_cast<uintptr_t>(data);
  range_->broken.store(false);
  range_->begin.store(begin, std::memory_order_release);
  const uintptr_t end = begin + static_cast<uintptr_t>(n_bytes);
  range_->end.store((end + page_size - 1) & ~(page_size - 1), std::memory_order_release);
}

FaultGuard::~FaultGuard() {
  if (range_ == nullptr) return;
  const std::lock_guard<std::mutex> lock(mutex);
  range_->end.store(0, std::memory_order_release);
}

}  // namespace gptailor
