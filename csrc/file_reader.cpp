#include "file_reader.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/vfs.h>
#endif

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "errors.h"
#include "mapped_file.h"

namespace gptailor {

namespace {

constexpr int64_t kRead = int64_t{16} << 20;    // one pread
constexpr int64_t kAhead = int64_t{16} << 20;   // prefetched after it
constexpr int64_t kBounce = int64_t{4} << 20;
constexpr int64_t kBlock = 4096;                // a multiple of all logical block sizes of disks

int open_retrying(const std::string& path, int flags) {
  int fd;
  do fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | flags);  // a FIFO must not hang us
  while (fd < 0 && errno == EINTR);
  return fd;
}

// One pread that is not interrupted; may be short, 0 at the end of the file.
ssize_t pread_retrying(int fd, void* to, int64_t n_bytes, int64_t offset) {
  ssize_t got;
  do got = pread(fd, to, static_cast<size_t>(n_bytes), offset);
  while (got < 0 && errno == EINTR);
  return got;
}

}  // namespace

Io io_of_file_system(uint32_t type) {
  // File systems on which a page fault is a round trip to a server or to another process. Faults read a few pages at a
  // time and wait for them; preads ask for megabytes. Names and numbers are from linux/magic.h, statfs(2), and for file
  // systems outside the kernel the clients' own headers, as collected in the `stat` of GNU coreutils. Block devices
  // shared by a cluster (GFS2, OCFS2) have a local page cache with readahead and stay mapped.
  switch (type) {
    case 0x6969:      // NFS
    case 0x517B:      // SMB
    case 0xFF534D42:  // CIFS
    case 0xFE534D42:  // SMB2
    case 0x0BD00BD0:  // Lustre
    case 0x47504653:  // GPFS, "GPFS"
    case 0x19830326:  // BeeGFS, formerly FhGFS
    case 0x00C36400:  // Ceph
    case 0x65735546:  // FUSE, "Fuse": sshfs, object stores, GlusterFS; local ones cross to a process, too
    case 0x01021997:  // 9P: folders of the host in a virtual machine
    case 0x5346414F:  // AFS
    case 0x6B414653:  // AFS, "kAFS"
    case 0x20030528:  // OrangeFS
    case 0xAAD7AAEA:  // PanFS
    case 0x73757245:  // Coda
    case 0x786F4256:  // VirtualBox shared folders
    case 0xBACBACBC:  // VMware shared folders
      return Io::pread;
    default:
      return Io::mmap;
  }
}

Io io_of_path(const std::string& path) {
#ifdef __linux__
  struct statfs status;
  int failed;
  do failed = statfs(path.c_str(), &status);
  while (failed != 0 && errno == EINTR);
  if (failed != 0) throw OsError(errno, "statfs", path);
  return io_of_file_system(static_cast<uint32_t>(status.f_type));
#else
  (void)path;
  return Io::mmap;
#endif
}

InputFile::InputFile(const std::string& path) : path_(path), fd_(open_retrying(path, 0)) {
  int error = 0;
  if (fd_ < 0 || fstat(fd_, &opened_) != 0) error = errno;
  else if (S_ISDIR(opened_.st_mode)) error = EISDIR;
  else if (!S_ISREG(opened_.st_mode)) error = EINVAL;
  if (error == 0) return;
  if (fd_ >= 0) close(fd_);
  throw OsError(error, "open", path);
}

InputFile::~InputFile() { close(fd_); }

void InputFile::changed() const { throw OsError(ESTALE, "the file changed while it was read", path_); }

void InputFile::check_intact() const {
  struct stat now;
  if (fstat(fd_, &now) != 0) throw OsError(errno, "fstat", path_);
  if (now.st_size != opened_.st_size || now.st_mtim.tv_sec != opened_.st_mtim.tv_sec ||
      now.st_mtim.tv_nsec != opened_.st_mtim.tv_nsec)
    changed();
}

struct FileReader::Bounce {
  Bounce() : memory(kBounce) {}
  const Buffer memory;
};

FileReader::FileReader(const std::string& path, bool direct) : InputFile(path) {
#ifdef POSIX_FADV_SEQUENTIAL
  posix_fadvise(fd(), 0, 0, POSIX_FADV_SEQUENTIAL);
#endif
#ifdef O_DIRECT
  // A separate file description: the flag must not affect the one used for copies.
  if (direct) direct_fd_ = open_retrying("/proc/self/fd/" + std::to_string(fd()), O_DIRECT);
#endif
  direct_ = direct_fd_ >= 0;
}

FileReader::~FileReader() {
  if (direct_fd_ >= 0) close(direct_fd_);
}

void FileReader::read(int64_t offset, int64_t n_bytes, std::byte* to) const {
  check_range(offset, n_bytes, size());
  if (direct_ && read_direct(offset, n_bytes, to)) return;
#ifdef POSIX_FADV_WILLNEED
  const int64_t ahead = std::min({n_bytes, kAhead, size() - offset - n_bytes});
  if (ahead > 0) posix_fadvise(fd(), offset + n_bytes, ahead, POSIX_FADV_WILLNEED);
#endif
  while (n_bytes > 0) {
    const ssize_t got = pread_retrying(fd(), to, std::min(n_bytes, kRead), offset);
    if (got < 0) throw OsError(errno, "pread", path());
    if (got == 0) changed();
    offset += got;
    n_bytes -= got;
    to += got;
  }
}

std::unique_ptr<FileReader::Bounce> FileReader::take_bounce() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (bounces_.empty()) return std::make_unique<Bounce>();
  auto bounce = std::move(bounces_.back());
  bounces_.pop_back();
  return bounce;
}

bool FileReader::read_direct(int64_t offset, int64_t n_bytes, std::byte* to) const {
  std::unique_ptr<Bounce> bounce;
  while (n_bytes > 0) {
    // Whole blocks are read directly to their destination if that is aligned, too.
    const int64_t skip = offset % kBlock;
    const bool straight = skip == 0 && n_bytes >= kBlock && reinterpret_cast<uintptr_t>(to) % kBlock == 0;
    const int64_t wanted = straight ? std::min(n_bytes - n_bytes % kBlock, kRead)
                                    : std::min((skip + n_bytes + kBlock - 1) / kBlock * kBlock, kBounce);
    if (!straight && !bounce) bounce = take_bounce();
    std::byte* at = straight ? to : bounce->memory.data();
    const ssize_t got = pread_retrying(direct_fd_, at, wanted, offset - skip);
    if (got < 0 && errno == EINVAL) {
      direct_ = false;  // could be opened but not read this way: don't try again
      return false;     // the caller reads everything again
    }
    if (got < 0) throw OsError(errno, "pread", path());
    if (got <= skip) changed();
    const int64_t useful = std::min<int64_t>(got - skip, n_bytes);
    if (!straight) std::memcpy(to, at + skip, static_cast<size_t>(useful));
    offset += useful;
    n_bytes -= useful;
    to += useful;
  }
  if (bounce) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bounces_.push_back(std::move(bounce));
  }
  return true;
}

Tensor in_memory(const Tensor& tensor) {
  if (tensor.data != nullptr || tensor.reader == nullptr) return tensor;
  const auto buffer = std::make_shared<Buffer>(tensor.n_bytes);
  tensor.reader->read(tensor.reader_offset, tensor.n_bytes, buffer->data());
  tensor.reader->check_intact();
  return view(buffer, buffer->data(), buffer->size(), 0, tensor.shape, tensor.dtype);
}

}  // namespace gptailor
