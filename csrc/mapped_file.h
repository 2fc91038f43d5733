// A read-only mapping of a whole file, and anonymous memory to write results into.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "fault_guard.h"
#include "file_reader.h"

namespace gptailor {

// An mmap that is unmapped when the object is destroyed.
class Mapping {
 public:
  Mapping() = default;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  std::byte* data() const { return data_; }
  int64_t size() const { return size_; }

 protected:
  std::byte* data_ = nullptr;  // nullptr if and only if size_ is 0: mmap refuses an empty range
  int64_t size_ = 0;
};

// PROT_READ, MAP_SHARED: no copy, nothing to write back. If somebody truncates the file in the meantime, the bytes
// beyond its new end are zeros, and check_intact() reports it.
class MappedFile : public Mapping, public InputFile {
 public:
  explicit MappedFile(const std::string& path);  // throws OsError

  int64_t size() const { return InputFile::size(); }
  Io io() const override { return Io::mmap; }
  const std::byte* mapped() const override { return data_; }
  void read(int64_t offset, int64_t n_bytes, std::byte* to) const override;
  void check_intact() const override;

 private:
  FaultGuard guard_;
};

// Zeroed, page-aligned and writable. Pages take memory once they are touched.
class Buffer : public Mapping {
 public:
  explicit Buffer(int64_t n_bytes);  // throws std::bad_alloc
};

}  // namespace gptailor
