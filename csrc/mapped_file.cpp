#include "mapped_file.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <new>

#include "asan.h"
#include "errors.h"

namespace gptailor {

Mapping::~Mapping() {
  if (data_ == nullptr) return;
  fence_tail(data_, size_, false);
  munmap(data_, static_cast<size_t>(size_));
}

MappedFile::MappedFile(const std::string& path) : InputFile(path) {
  if (InputFile::size() == 0) return;
  void* address = mmap(nullptr, static_cast<size_t>(InputFile::size()), PROT_READ, MAP_SHARED, fd(), 0);
  if (address == MAP_FAILED) throw OsError(errno, "mmap", path);
  data_ = static_cast<std::byte*>(address);
  size_ = InputFile::size();
  fence_tail(data_, size_, true);
  guard_.watch(data_, size_);
}

void MappedFile::read(int64_t offset, int64_t n_bytes, std::byte* to) const {
  check_range(offset, n_bytes, size());
  if (n_bytes > 0) std::memcpy(to, data_ + offset, static_cast<size_t>(n_bytes));
  if (guard_.broken()) changed();
}

void MappedFile::check_intact() const {
  if (guard_.broken()) changed();
  InputFile::check_intact();
}

Buffer::Buffer(int64_t n_bytes) {
  if (n_bytes == 0) return;
  void* address =
      mmap(nullptr, static_cast<size_t>(n_bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  madvise(address, static_cast<size_t>(n_bytes), MADV_HUGEPAGE);  // fewer page faults; a hint that may be refused
#endif
  data_ = static_cast<std::byte*>(address);
  size_ = n_bytes;
  fence_tail(data_, size_, true);
}

}  // namespace gptailor
