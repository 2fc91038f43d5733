// An open input file, and two ways to read it without mapping it: pread, and bypassing the page cache.
#pragma once

#include <sys/stat.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "byte_reader.h"
#include "tensor.h"

namespace gptailor {

enum class Io { mmap, pread, direct };

// mmap or pread, by the f_type from statfs.
Io io_of_file_system(uint32_t type);
Io io_of_path(const std::string& path);  // throws OsError

// A regular file that is open for reading as long as the object lives.
class InputFile : public ByteReader {
 public:
  explicit InputFile(const std::string& path);  // throws OsError
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  ~InputFile() override;

  const std::string& path() const { return path_; }
  int fd() const { return fd_; }
  int64_t size() const { return opened_.st_size; }  // at open
  virtual Io io() const = 0;
  virtual const std::byte* mapped() const { return nullptr; }  // the file's first byte

  // Compares size and time of change with those at open. A file that was renamed or replaced is not noticed: the open
  // one is still intact.
  void check_intact() const override;

 protected:
  [[noreturn]] void changed() const;

 private:
  std::string path_;
  int fd_ = -1;
  struct stat opened_;
};

// Reads with pread and prefetches what follows; `direct`: bypasses the page cache, in whole blocks, if the file system
// supports that.
class FileReader : public InputFile {
 public:
  FileReader(const std::string& path, bool direct);
  ~FileReader() override;

  Io io() const override { return direct_ ? Io::direct : Io::pread; }
  void read(int64_t offset, int64_t n_bytes, std::byte* to) const override;

 private:
  struct Bounce;
  std::unique_ptr<Bounce> take_bounce() const;
  bool read_direct(int64_t offset, int64_t n_bytes, std::byte* to) const;  // false: not supported

  int direct_fd_ = -1;
  mutable std::atomic<bool> direct_{false};
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Bounce>> bounces_;  // currently unused ones
};

// The tensor if it is in memory, else a copy that is read. Throws OsError, std::bad_alloc.
Tensor in_memory(const Tensor& tensor);

}  // namespace gptailor
