// Lets AddressSanitizer see where a mapping ends: it knows about allocations, not about mmap. Nothing without it.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <unistd.h>
#endif

namespace gptailor {

// Reading or writing between the end of [data, data + size) and the end of its last page is a fault from now on, or no
// longer: before munmap, because the addresses will be somebody else's.
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
