#include "load.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "errors.h"
#include "parallel.h"
#include "tensor.h"

namespace gptailor {

namespace {

constexpr int64_t kMinChunk = int64_t{1} << 20;
constexpr int64_t kMaxRead = int64_t{1} << 30;  // Linux reads less than 2 GiB at a time
constexpr int kUsefulThreads = 8, kMaxThreads = 64;

int64_t round_down(int64_t n) { return n / kPage * kPage; }
int64_t round_up(int64_t n) { return (n + kPage - 1) / kPage * kPage; }

// Fills [to, to + n_bytes) from `offset`; reads up to at_most bytes if whole blocks are required. Returns false if the
// file system refuses to read this way.
bool read_range(int fd, int64_t offset, int64_t n_bytes, int64_t at_most, std::byte* to, const std::string& path) {
  for (int64_t done = 0; done < n_bytes;) {
    const auto want = static_cast<size_t>(std::min(at_most - done, kMaxRead));
    const ssize_t n = pread(fd, to + done, want, offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EINVAL && at_most != n_bytes) return false;
    if (n < 0) throw OsError(errno, "read", path);
    if (n == 0) throw OsError(ESTALE, "read", path);  // became shorter
    done += n;
  }
  return true;
}

// Host memory: bytes are read to their destination, or (direct, which needs aligned addresses) copied there.
class HostStaging : public Staging {
 public:
  HostStaging(int n_slots, int64_t slot_bytes) : slot_bytes_(slot_bytes) {
    if (n_slots == 0) return;
    memory_.reset(static_cast<std::byte*>(
        std::aligned_alloc(static_cast<size_t>(kPage), static_cast<size_t>(n_slots * slot_bytes))));
    if (!memory_) throw std::bad_alloc();
  }
  std::byte* buffer(int slot) override { return memory_ ? memory_.get() + slot * slot_bytes_ : nullptr; }
  void wait(int) override {}
  void send(const std::byte* from, std::byte* to, int64_t n_bytes, uintptr_t) override {
    memcpy(to, from, static_cast<size_t>(n_bytes));
  }
  void sent(int, uintptr_t) override {}
  void pin(const std::byte*, int64_t) override { throw std::runtime_error("host memory is not pinned"); }
  void unpin(const std::byte*) noexcept override {}
  void wait_for_all() noexcept override {}

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  const int64_t slot_bytes_;
  std::unique_ptr<std::byte, Free> memory_;
};

}  // namespace

std::unique_ptr<Staging> make_host_staging(int n_slots, int64_t slot_bytes, bool in_place) {
  return std::make_unique<HostStaging>(in_place ? 0 : n_slots, slot_bytes);
}

LoadWay load_way_named(const std::string& name) {
  if (name == "auto") return LoadWay::automatic;
  if (name == "pinned") return LoadWay::pinned;
  if (name == "pread") return LoadWay::buffered;
  if (name == "direct") return LoadWay::direct;
  throw std::invalid_argument("unknown way to load '" + name + "': known are auto, pinned, pread, direct");
}

std::vector<LoadChunk> plan_chunks(std::vector<LoadRange> ranges, int64_t max_bytes) {
  std::sort(ranges.begin(), ranges.end(), [](const LoadRange& a, const LoadRange& b) {
    return a.file != b.file ? a.file < b.file : a.offset != b.offset ? a.offset < b.offset : a.to < b.to;
  });
  std::vector<LoadChunk> chunks;
  for (const LoadRange& range : ranges) {
    for (int64_t done = 0; done < range.n_bytes;) {
      const int64_t offset = range.offset + done;
      // The last chunk is extended if these bytes begin within it or at most a page after it.
      const auto fits = [&](const LoadChunk& c) {
        return c.file == range.file && offset >= c.offset && offset - (c.offset + c.n_bytes) <= kPage &&
               offset < round_down(c.offset + max_bytes);
      };
      if (chunks.empty() || !fits(chunks.back())) chunks.push_back({range.file, offset, 0, {}});
      LoadChunk& chunk = chunks.back();
      const int64_t n = std::min(range.n_bytes - done, round_down(chunk.offset + max_bytes) - offset);
      const int64_t at = offset - chunk.offset;
      std::byte* to = range.to + done;
      const bool goes_on = !chunk.pieces.empty() && chunk.pieces.back().at + chunk.pieces.back().n_bytes == at &&
                           chunk.pieces.back().to + chunk.pieces.back().n_bytes == to;
      if (goes_on) chunk.pieces.back().n_bytes += n;
      else chunk.pieces.push_back({at, n, to});
      chunk.n_bytes = std::max(chunk.n_bytes, at + n);
      done += n;
    }
  }
  return chunks;
}

// An open file.
class Loader::File {
 public:
  File(const std::string& path, bool direct) : path_(path) {
    do fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO must not hang us
    while (fd_ < 0 && errno == EINTR);
    struct stat status;
    if (fd_ < 0 || fstat(fd_, &status) != 0) fail(errno);
    if (!S_ISREG(status.st_mode)) fail(S_ISDIR(status.st_mode) ? EISDIR : EINVAL);
    size_ = status.st_size;
    identity_ = {static_cast<int64_t>(status.st_dev), static_cast<int64_t>(status.st_ino), size_,
                 static_cast<int64_t>(status.st_mtim.tv_sec), static_cast<int64_t>(status.st_mtim.tv_nsec)};
#ifdef O_DIRECT
    if (direct) direct_fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);  // -1 if not supported
#endif
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() { close_all(); }

  const std::string& path() const { return path_; }
  int64_t size() const { return size_; }
  int fd() const { return fd_; }
  int direct_fd() const { return direct_fd_; }
  const std::vector<int64_t>& identity() const { return identity_; }

  void check_size() const {
    struct stat status;
    if (fstat(fd_, &status) != 0) throw OsError(errno, "stat", path_);
    if (status.st_size < size_) throw OsError(ESTALE, "read", path_);
  }

  // Whether the page cache has the ranges, judging by a few sampled bytes. False if the kernel can't tell.
  bool is_cached(const std::vector<LoadRange>& ranges, int index) const {
#ifdef RWF_NOWAIT
    constexpr int64_t kSamples = 8;  // of each range
    for (const LoadRange& range : ranges) {
      if (range.file != index || range.n_bytes == 0) continue;
      for (int64_t k = 0; k <= kSamples; ++k) {
        char byte;
        const iovec to{&byte, 1};
        const int64_t at = range.offset + (range.n_bytes - 1) / kSamples * k;
        if (preadv2(fd_, &to, 1, at, RWF_NOWAIT) != 1) return false;
      }
    }
    return true;
#else
    return false;
#endif
  }

 private:
  void close_all() {
    if (fd_ >= 0) close(fd_);
    if (direct_fd_ >= 0) close(direct_fd_);
  }
  [[noreturn]] void fail(int error) {
    close_all();
    throw OsError(error, "open", path_);
  }

  std::string path_;
  int fd_ = -1, direct_fd_ = -1;
  int64_t size_ = 0;
  std::vector<int64_t> identity_;
};

// A mapping of a whole file that the device reads directly. The CPU never touches its pages, so a file that became
// shorter causes no SIGBUS.
class Loader::PinnedFile {
 public:
  PinnedFile(const File& file, Staging& staging) : identity(file.identity()), size(file.size()), staging_(staging) {
    void* address = mmap(nullptr, static_cast<size_t>(size), PROT_READ, MAP_SHARED, file.fd(), 0);
    if (address == MAP_FAILED) throw OsError(errno, "mmap", file.path());
    data = static_cast<const std::byte*>(address);
    try {
      staging_.pin(data, size);
    } catch (...) {
      munmap(address, static_cast<size_t>(size));
      throw;
    }
  }
  PinnedFile(const PinnedFile&) = delete;
  PinnedFile& operator=(const PinnedFile&) = delete;
  ~PinnedFile() {
    staging_.unpin(data);
    munmap(const_cast<std::byte*>(data), static_cast<size_t>(size));
  }

  const std::vector<int64_t> identity;
  const int64_t size;
  const std::byte* data = nullptr;

 private:
  Staging& staging_;
};

Loader::Loader(int device, LoaderOptions options) : device_(device), options_(options) {
  if (device < kHost) throw std::invalid_argument("device is " + std::to_string(device));
  if (options.n_threads < 0) throw std::invalid_argument("threads is negative");
  if (options.pin_bytes < 0) throw std::invalid_argument("pin_bytes is negative");
  if (options.buffer_bytes < 1 || options.buffer_bytes > kMaxRead)
    throw std::invalid_argument("buffer_bytes must be 1 to 2^30, not " + std::to_string(options.buffer_bytes));
  if (device == kHost && options.way == LoadWay::pinned)
    throw std::invalid_argument("only loads to a GPU can be pinned");
  options_.buffer_bytes = round_up(options.buffer_bytes);
  options_.n_threads = options.n_threads > 0 ? std::min(options.n_threads, kMaxThreads)
                                             : std::min(available_cores(), kUsefulThreads);
  const int n_slots = 2 * options_.n_threads;
  const int64_t slot_bytes = options_.buffer_bytes + 2 * kPage;  // direct reads begin and end at whole blocks
  staging_ = device == kHost ? make_host_staging(n_slots, slot_bytes, options_.way != LoadWay::direct)
                             : make_cuda_staging(device, n_slots, slot_bytes);
}

Loader::~Loader() {
  staging_->wait_for_all();
  pinned_.clear();
}

void Loader::load(const std::vector<std::string>& paths, const std::vector<LoadRange>& ranges, uintptr_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::unique_ptr<File>> files;
  for (const std::string& path : paths)
    files.push_back(std::make_unique<File>(path, options_.way == LoadWay::direct));
  for (const LoadRange& range : ranges)
    check_range(range.offset, range.n_bytes, files[static_cast<size_t>(range.file)]->size());

  try {
    std::vector<LoadRange> to_read;
    int64_t n_bytes = 0;
    for (int index = 0; index < static_cast<int>(files.size()); ++index) {
      if (const PinnedFile* file = pinned(*files[static_cast<size_t>(index)], ranges, index)) {
        send_pinned(*file, ranges, index, stream);
        continue;
      }
      for (const LoadRange& range : ranges)
        if (range.file == index) to_read.push_back(range), n_bytes += range.n_bytes;
    }
    const int64_t share = round_up(n_bytes / options_.n_threads + 1);  // so that all threads share a small load, too
    const int64_t chunk_bytes = std::clamp(share, std::min(kMinChunk, options_.buffer_bytes), options_.buffer_bytes);
    const auto chunks = plan_chunks(std::move(to_read), chunk_bytes);
    std::vector<int> turns(static_cast<size_t>(options_.n_threads));
    parallel_for(static_cast<int64_t>(chunks.size()), options_.n_threads, [&](int64_t k, int thread) {
      const LoadChunk& chunk = chunks[static_cast<size_t>(k)];
      const int slot = 2 * thread + (turns[static_cast<size_t>(thread)]++ & 1);
      read_chunk(*files[static_cast<size_t>(chunk.file)], chunk, slot, stream);
    });
    for (const auto& file : files) file->check_size();
  } catch (...) {
    staging_->wait_for_all();
    throw;
  }
}

void Loader::read_chunk(const File& file, const LoadChunk& chunk, int slot, uintptr_t stream) {
  std::byte* buffer = staging_->buffer(slot);
  int64_t n_bytes = 0;
  for (const auto& piece : chunk.pieces) n_bytes += piece.n_bytes;
  if (buffer == nullptr) {
    for (const auto& piece : chunk.pieces)
      read_range(file.fd(), chunk.offset + piece.at, piece.n_bytes, piece.n_bytes, piece.to, file.path());
    __atomic_fetch_add(&bytes_.buffered, n_bytes, __ATOMIC_RELAXED);
    return;
  }
  staging_->wait(slot);
  // Keep the alignment within a page: copies from the page cache are fastest then, and direct reads require it.
  const int64_t begin = round_down(chunk.offset);
  const int64_t skew = chunk.offset - begin;
  const bool direct =
      file.direct_fd() >= 0 && read_range(file.direct_fd(), begin, skew + chunk.n_bytes,
                                          round_up(skew + chunk.n_bytes), buffer, file.path());
  if (!direct) read_range(file.fd(), chunk.offset, chunk.n_bytes, chunk.n_bytes, buffer + skew, file.path());
  __atomic_fetch_add(direct ? &bytes_.direct : &bytes_.buffered, n_bytes, __ATOMIC_RELAXED);
  for (const auto& piece : chunk.pieces) staging_->send(buffer + skew + piece.at, piece.to, piece.n_bytes, stream);
  staging_->sent(slot, stream);
}

// The pinned mapping of a file, created if requested and possible.
const Loader::PinnedFile* Loader::pinned(const File& file, const std::vector<LoadRange>& ranges, int index) {
  const bool must = options_.way == LoadWay::pinned;
  if ((!must && options_.way != LoadWay::automatic) || device_ == kHost || file.size() == 0) return nullptr;
  for (const auto& known : pinned_)
    if (known->identity == file.identity()) return known.get();
  if (must) {
    pinned_.push_back(std::make_unique<PinnedFile>(file, *staging_));
  } else {
    if (file.size() > options_.pin_bytes - pinned_size_ || !file.is_cached(ranges, index)) return nullptr;
    if (std::find(refused_.begin(), refused_.end(), file.path()) != refused_.end()) return nullptr;
    try {
      pinned_.push_back(std::make_unique<PinnedFile>(file, *staging_));
    } catch (const std::runtime_error&) {
      refused_.push_back(file.path());  // the kernel or the driver can't pin it: read it like any other
      return nullptr;
    }
  }
  pinned_size_ += file.size();
  return pinned_.back().get();
}

void Loader::send_pinned(const PinnedFile& file, const std::vector<LoadRange>& ranges, int index, uintptr_t stream) {
  std::vector<LoadRange> mine;
  std::copy_if(ranges.begin(), ranges.end(), std::back_inserter(mine),
               [&](const LoadRange& range) { return range.file == index; });
  for (const LoadChunk& chunk : plan_chunks(std::move(mine), kMaxRead))
    for (const auto& piece : chunk.pieces) {
      staging_->send(file.data + chunk.offset + piece.at, piece.to, piece.n_bytes, stream);
      bytes_.pinned += piece.n_bytes;
    }
}

LoadedBytes Loader::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_;
}

}  // namespace gptailor
