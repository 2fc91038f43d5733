#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <new>

#include "asan.h"
#include "errors.h"

namespace gptailor {

namespace {

struct FileDescriptor {
  explicit FileDescriptor(int fd) : fd(fd) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (fd >= 0) close(fd);
  }
  const int fd;
};

int open_retrying(const std::string& path) {
  int fd;
  do fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO must not hang us
  while (fd < 0 && errno == EINTR);
  return fd;
}

}  // namespace

Mapping::~Mapping() {
  if (data_ == nullptr) return;
  fence_tail(data_, size_, false);
  munmap(data_, static_cast<size_t>(size_));
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const FileDescriptor file(open_retrying(path));
  struct stat status;
  if (file.fd < 0 || fstat(file.fd, &status) != 0) throw OsError(errno, "open", path);
  if (S_ISDIR(status.st_mode)) throw OsError(EISDIR, "open", path);
  if (!S_ISREG(status.st_mode)) throw OsError(EINVAL, "open", path);
  if (status.st_size == 0) return;
  void* address = mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ, MAP_SHARED, file.fd, 0);
  if (address == MAP_FAILED) throw OsError(errno, "mmap", path);
  data_ = static_cast<std::byte*>(address);
  size_ = status.st_size;
  fence_tail(data_, size_, true);
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
