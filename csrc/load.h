// Loads file ranges into the memory of a device. Several threads read into staging buffers; one buffer is transferred
// while the next is filled. Nothing here knows about CUDA: a Staging provides the buffers and the transfers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace gptailor {

struct LoadRange {
  int file = 0;  // index of its path
  int64_t offset = 0;
  int64_t n_bytes = 0;
  std::byte* to = nullptr;  // memory of the device
};

// A part of one file that fits into a buffer, and where its bytes go.
struct LoadChunk {
  struct Piece {
    int64_t at = 0;  // counted from the chunk's first byte
    int64_t n_bytes = 0;
    std::byte* to = nullptr;
  };
  int file = 0;
  int64_t offset = 0;
  int64_t n_bytes = 0;
  std::vector<Piece> pieces;
};

// Cuts ranges into chunks of at most max_bytes (a multiple of kPage), in the order of files and offsets. Neighbours
// share chunks and, if they are adjacent in the destination, too, pieces. Chunks end at multiples of kPage if possible.
inline constexpr int64_t kPage = 4096;
std::vector<LoadChunk> plan_chunks(std::vector<LoadRange> ranges, int64_t max_bytes);

// Buffers for transfers to the device. wait, send and sent of different slots may run at the same time.
class Staging {
 public:
  virtual ~Staging() = default;
  // The buffer to read into: page-aligned, large enough for a chunk and a page at each end. nullptr: read directly to
  // the destination.
  virtual std::byte* buffer(int slot) = 0;
  virtual void wait(int slot) = 0;  // until everything sent from it has arrived
  virtual void send(const std::byte* from, std::byte* to, int64_t n_bytes, uintptr_t stream) = 0;
  virtual void sent(int slot, uintptr_t stream) = 0;  // after the last send from it

  // Lets the device read a whole read-only mapping directly; throws std::runtime_error if it can't.
  virtual void pin(const std::byte* data, int64_t n_bytes) = 0;
  virtual void unpin(const std::byte* data) noexcept = 0;  // there must be no pending transfer from it

  virtual void wait_for_all() noexcept = 0;  // until no transfer is pending
};

// automatic: pinned if the file is in the page cache and the device can read it there, else buffered.
enum class LoadWay : uint8_t { automatic, pinned, buffered, direct };
LoadWay load_way_named(const std::string& name);  // throws std::invalid_argument

struct LoaderOptions {
  LoadWay way = LoadWay::automatic;
  int n_threads = 0;                          // 0: as many as there are cores, at most 8; 64 is the limit
  int64_t buffer_bytes = int64_t{8} << 20;    // of each of a thread's two buffers; rounded up to a multiple of kPage
  int64_t pin_bytes = 0;                      // the most bytes of mapped files to keep pinned
};

// How many bytes were loaded in each way so far.
struct LoadedBytes {
  int64_t pinned = 0, buffered = 0, direct = 0;
};

// Buffers for `n_slots` slots of `slot_bytes` bytes.
std::unique_ptr<Staging> make_host_staging(int n_slots, int64_t slot_bytes, bool in_place);
std::unique_ptr<Staging> make_cuda_staging(int device, int n_slots, int64_t slot_bytes);  // throws std::runtime_error

class Loader {
 public:
  static constexpr int kHost = -1;

  // device: a GPU's index, or kHost. Allocates all memory that it will need. Throws std::invalid_argument,
  // std::runtime_error, std::bad_alloc.
  Loader(int device, LoaderOptions options);
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;
  ~Loader();

  // Returns when everything is read and the last transfer is queued on `stream` (for the host: done). After an
  // exception no transfer is pending. One call at a time; others wait. Throws OsError, std::invalid_argument if a range
  // is not within its file, std::runtime_error with CUDA's message.
  void load(const std::vector<std::string>& paths, const std::vector<LoadRange>& ranges, uintptr_t stream);

  LoadedBytes bytes() const;
  int device() const { return device_; }

 private:
  class File;
  class PinnedFile;

  const PinnedFile* pinned(const File& file, const std::vector<LoadRange>& ranges, int index);
  void send_pinned(const PinnedFile& file, const std::vector<LoadRange>& ranges, int index, uintptr_t stream);
  void read_chunk(const File& file, const LoadChunk& chunk, int slot, uintptr_t stream);

  const int device_;
  LoaderOptions options_;
  std::unique_ptr<Staging> staging_;
  std::vector<std::unique_ptr<PinnedFile>> pinned_;
  int64_t pinned_size_ = 0;
  std::vector<std::string> refused_;  // could not be pinned
  mutable std::mutex mutex_;
  LoadedBytes bytes_;
};

}  // namespace gptailor
