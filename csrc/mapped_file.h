// A read-only mapping of a whole file, and anonymous memory to write results into.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace gptailor {

// An mmap that is unmapped when it goes.
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

// PROT_READ, MAP_SHARED: no copy, nothing to write back. If somebody truncates the file meanwhile, reading past its new
// end is a SIGBUS: inputs must stay as they are while they are in use.
class MappedFile : public Mapping {
 public:
  explicit MappedFile(const std::string& path);  // throws OsError
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Zeroed, page-aligned, writable. Pages cost memory once they are touched.
class Buffer : public Mapping {
 public:
  explicit Buffer(int64_t n_bytes);  // throws std::bad_alloc
};

}  // namespace gptailor
