// Tells AddressSanitizer where a mapping ends, because it knows about allocations but not about mmap. Does nothing
// without it.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <unistd.h>
#endif

namespace gptailor {

// Makes accesses between the end of [data, data + size) and the end of its last page faults (`on`), or allows them
// again, which is needed before munmap, because the addresses will be reused.
inline void fence_tail(const std::byte* data, int64_t size, bool on) {
#ifdef __SANITIZE_ADDRESS__
  const int64_t page = sysconf(_SC_PAGESIZE);
  const auto tail = static_cast<size_t>((page - size % page) % page);
  if (on) ASAN_POISON_MEMORY_REGION(data + size, tail);
  else ASAN_UNPOISON_MEMORY_REGION(data + size, tail);
#else
  (void)data, (void)size, (void)on;
#endif
}

}  // namespace gptailor
