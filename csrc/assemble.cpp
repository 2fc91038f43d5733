#include "assemble.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/sendfile.h>
#endif

#include <algorithm>
#include <cerrno>
#include <limits>
#include <memory>
#include <string>

#include "errors.h"

namespace gptailor {

namespace {

constexpr int64_t kChunk = int64_t{64} << 20;        // between two checks for signals
constexpr int64_t kBounceBytes = int64_t{4} << 20;

enum class Way { copy_file_range, sendfile, pread_pwrite };

struct Job {
  int src_fd;
  int64_t src;
  int dst_fd;
  int64_t dst;
};

// Errors that mean "not this way for these files" rather than "not at all".
bool means_unsupported(int error) {
  return error == EXDEV || error == EINVAL || error == ENOSYS || error == EOPNOTSUPP || error == ENOTSUP ||
         error == EPERM || error == EBADF || error == EOVERFLOW || error == ETXTBSY;
}

#ifdef __linux__
// sendfile writes at the position of the file description, which duplicated descriptors share. Opening the file again
// gives us a position of our own.
int reopen_for_writing(int fd) {
  return open(("/proc/self/fd/" + std::to_string(fd)).c_str(), O_WRONLY | O_CLOEXEC);
}

ssize_t by_sendfile(const Job& job, size_t n) {
  const int fd = reopen_for_writing(job.dst_fd);
  if (fd < 0) {
    errno = ENOSYS;
    return -1;
  }
  off_t src = job.src;
  ssize_t done = -1;
  if (lseek(fd, job.dst, SEEK_SET) == job.dst) done = sendfile(fd, job.src_fd, &src, n);
  const int error = errno;
  close(fd);
  errno = error;
  return done;
}
#endif

ssize_t by_pread_pwrite(const Job& job, size_t n, std::unique_ptr<char[]>& bounce) {
  if (!bounce) bounce.reset(new char[kBounceBytes]);
  const ssize_t got = pread(job.src_fd, bounce.get(), std::min(n, static_cast<size_t>(kBounceBytes)), job.src);
  for (ssize_t written = 0; written < got;) {
    const ssize_t w = pwrite(job.dst_fd, bounce.get() + written, static_cast<size_t>(got - written), job.dst + written);
    if (w < 0 && errno == EINTR) continue;
    if (w < 0) return -1;
    written += w;
  }
  return got;
}

// A short count is fine. Returns 0 at what looks like the end of the source.
ssize_t copy_some(Way way, const Job& job, size_t n, std::unique_ptr<char[]>& bounce) {
#ifdef __linux__
  if (way == Way::copy_file_range) {
    loff_t src = job.src, dst = job.dst;
    return copy_file_range(job.src_fd, &src, job.dst_fd, &dst, n, 0);
  }
  if (way == Way::sendfile) return by_sendfile(job, n);
#else
  if (way != Way::pread_pwrite) {
    errno = ENOSYS;
    return -1;
  }
#endif
  return by_pread_pwrite(job, n, bounce);
}

void check(const Job& job, int64_t n_bytes) {
  constexpr int64_t max = std::numeric_limits<int64_t>::max();
  if (job.src < 0 || job.dst < 0 || n_bytes < 0) throw std::invalid_argument("a negative offset or byte count");
  if (n_bytes > max - job.src || n_bytes > max - job.dst)
    throw std::invalid_argument("the byte range ends beyond 2^63");
  struct stat src, dst;
  if (fstat(job.src_fd, &src) != 0) throw OsError(errno, "the source cannot be read");
  if (fstat(job.dst_fd, &dst) != 0) throw OsError(errno, "the destination cannot be written");
  // Checked here, because reopening the destination would give rights that the caller's descriptor lacks.
  const int src_flags = fcntl(job.src_fd, F_GETFL), dst_flags = fcntl(job.dst_fd, F_GETFL);
  if ((src_flags & O_ACCMODE) == O_WRONLY) throw OsError(EBADF, "the source is not open for reading");
  if ((dst_flags & O_ACCMODE) == O_RDONLY) throw OsError(EBADF, "the destination is not open for writing");
  if (dst_flags & O_APPEND) throw std::invalid_argument("the destination is open for appending");
  if (S_ISREG(src.st_mode) && src.st_dev == dst.st_dev && src.st_ino == dst.st_ino && job.src < job.dst + n_bytes &&
      job.dst < job.src + n_bytes)
    throw std::invalid_argument("source and destination overlap in one file");
}

}  // namespace

const char* copy_range(int src_fd, int64_t src_offset, int dst_fd, int64_t dst_offset, int64_t n_bytes,
                       const std::function<void()>& poll) {
  Job job{src_fd, src_offset, dst_fd, dst_offset};
  check(job, n_bytes);
  Way way = Way::copy_file_range;
  std::unique_ptr<char[]> bounce;
  while (n_bytes > 0) {
    poll();
    const ssize_t done = copy_some(way, job, static_cast<size_t>(std::min(n_bytes, kChunk)), bounce);
    if (done > 0) {
      job.src += done;
      job.dst += done;
      n_bytes -= done;
    } else if (done < 0 && errno == EINTR) {
      continue;
    } else if (way != Way::pread_pwrite && (done == 0 || means_unsupported(errno))) {
      // Some file systems return 0 when they mean "unsupported": only pread knows the end of a file.
      way = way == Way::copy_file_range ? Way::sendfile : Way::pread_pwrite;
    } else if (done == 0) {
      throw OsError(EIO, "the source ends " + std::to_string(n_bytes) + " bytes too early, at byte " +
                             std::to_string(job.src));
    } else {
      throw OsError(errno, "copying failed");
    }
  }
  return way == Way::copy_file_range ? "copy_file_range" : way == Way::sendfile ? "sendfile" : "pread/pwrite";
}

void start_write_back(int fd, int64_t offset, int64_t n_bytes) {
#ifdef SYNC_FILE_RANGE_WRITE
  if (sync_file_range(fd, offset, n_bytes, SYNC_FILE_RANGE_WRITE) != 0 && errno != ENOSYS && errno != ESPIPE)
    throw OsError(errno, "write-back can't be started");
#else
  (void)fd, (void)offset, (void)n_bytes;
#endif
}

}  // namespace gptailor
