// An input file that is open, and two ways to read it without mapping it: pread, and around the page cache.
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

// mmap or pread, by the f_type that statfs tells.
Io io_of_file_system(uint32_t type);
Io io_of_path(const std::string& path);  // throws OsError

// A regular file, open for reading until the object goes.
class InputFile : public ByteReader {
 public:
  explicit InputFile(const std::string& path);  // throws OsError
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  ~InputFile() override;

  const std::string& path() const { return path_; }
  int fd() const { return fd_; }
  int64_t size() const { return opened_.st_size; }  // when it was opened
  virtual Io io() const = 0;
  virtual const std::byte* mapped() const { return nullptr; }  // the file's first byte

  // Compares size and time of change with those at open. A file that was renamed or replaced by another is still the
  // one that is open.
  void check_intact() const override;

 protected:
  [[noreturn]] void changed() const;

 private:
  std::string path_;
  int fd_ = -1;
  struct stat opened_;
};

// Reads with pread and asks for what comes next; `direct`: around the page cache, in whole blocks, where the file system
// can do that.
class FileReader : public InputFile {
 public:
  FileReader(const std::string& path, bool direct);
  ~FileReader() override;

  Io io() const override { return direct_ ? Io::direct : Io::pread; }
  void read(int64_t offset, int64_t n_bytes, std::byte* to) const override;

 private:
  struct Bounce;
  std::unique_ptr<Bounce> take_bounce() const;
  bool read_direct(int64_t offset, int64_t n_bytes, std::byte* to) const;  // false: not possible here

  int direct_fd_ = -1;
  mutable std::atomic<bool> direct_{false};
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Bounce>> bounces_;  // those that no thread is using
};

// The tensor in memory: itself, or a copy that was read. Throws OsError, std::bad_alloc.
Tensor in_memory(const Tensor& tensor);

}  // namespace gptailor
